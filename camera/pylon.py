"""Basler cameras through pypylon, whose wheel brings the runtime. PYLON_CAMEMU=2 emulates two of them."""

from typing import Any

import numpy as np
from pypylon import genicam, pylon

from flawline.camera.buffers import as_picture
from flawline.camera.device_camera import Block, DeviceCamera
from flawline.camera.discovery import Device, choose
from flawline.camera.features import FeatureMap
from flawline.camera.genapi import GenApiFeatures
from flawline.config.errors import CameraError, ImageError
from flawline.config.settings_camera import CameraSettings

_BUFFERS = 16


def list_devices() -> list[Device]:
    """Every Basler camera that this machine sees."""
    return [device for device, _ in _discover()]


def _discover() -> list[tuple[Device, Any]]:
    infos = pylon.TlFactory.GetInstance().EnumerateDevices()
    return [(_device(index, info), info) for index, info in enumerate(infos)]


def _device(index: int, info: Any) -> Device:
    def text(name: str) -> str:
        there, value = info.GetPropertyValue(name)
        return str(value) if there else ""

    mac = text("MacAddress").lower()
    mac = ":".join(mac[i : i + 2] for i in range(0, 12, 2)) if len(mac) == 12 else mac
    vendor, model, serial = text("VendorName"), text("ModelName"), text("SerialNumber")
    return Device("pylon", index, vendor, model, serial, text("UserDefinedName"), text("IpAddress"), mac)


class PylonCamera(DeviceCamera):
    """A Basler camera. Pixels are a view into the driver's buffer: no copy before the ring's."""

    vendor_errors = (genicam.GenericException,)

    def __init__(self, settings: CameraSettings) -> None:
        super().__init__(settings)
        self._camera: Any = None
        self._result: Any = None
        self._ns_per_tick = 1.0

    def connect(self) -> tuple[Device, FeatureMap]:
        """Enumerate, choose, open."""
        found = _discover()
        device = choose(self.settings, [device for device, _ in found], self.first)
        factory = pylon.TlFactory.GetInstance()
        try:
            self._camera = pylon.InstantCamera(factory.CreateDevice(found[device.index][1]))
            self._camera.Open()
        except genicam.AccessException as error:
            raise CameraError(f"camera {self.name!r}: access denied: another application holds {device}") from error
        features = GenApiFeatures(self._camera.GetNodeMap(), genicam)
        frequency = features.read("GevTimestampTickFrequency")  # GigE Vision 1; the others count in ns
        self._ns_per_tick = 1e9 / float(frequency) if frequency else 1.0
        return device, features

    def start(self) -> None:
        """Grab every frame, in order."""
        self._camera.MaxNumBuffer.Value = _BUFFERS
        self._camera.StartGrabbing(pylon.GrabStrategy_OneByOne)

    def receive(self, timeout_s: float) -> Block | None:
        """The next result; the one before is given back to the driver."""
        self._give_back()
        result = self._camera.RetrieveResult(max(1, round(timeout_s * 1000)), pylon.TimeoutHandling_Return)
        if not result.IsValid():
            return None
        self._result = result
        ticks = result.GetTimeStamp()
        device_ns = int(ticks * self._ns_per_tick) if ticks else None
        number = result.GetBlockID()
        name = _format_name(result.GetPixelType())
        if not result.GrabSucceeded():
            self.check_alive()  # what was queued when the cable was pulled comes back as failed: no frames of its own
            return Block(number, device_ns, None, name, fault=result.GetErrorDescription() or "the grab failed")
        height, width = result.GetHeight(), result.GetWidth()
        try:
            data = np.frombuffer(result.GetMemoryView(), np.uint8)
            pixels = as_picture(data, name, height, width, result.GetPaddingX())
        except ImageError as error:
            return Block(number, device_ns, None, name, unreadable=str(error))
        return Block(number, device_ns, pixels, name, (height, width) if pixels.ndim == 1 else None)

    def is_ready_within(self, timeout_s: float) -> bool:
        """The driver's own way to ask, where the camera has one."""
        camera = self._camera
        if camera is None or not camera.CanWaitForFrameTriggerReady():
            return True
        return bool(camera.WaitForFrameTriggerReady(round(timeout_s * 1000), pylon.TimeoutHandling_Return))

    def _give_back(self) -> None:
        result, self._result = self._result, None
        if result is not None:
            result.Release()

    def check_alive(self) -> None:
        """The driver knows when a device is removed."""
        if self._camera.IsCameraDeviceRemoved():
            raise CameraError(f"camera {self.name!r}: is lost: the device was removed")

    def disconnect(self) -> None:
        """Stop and close."""
        camera, self._camera = self._camera, None
        self._give_back()
        if camera is not None:
            camera.StopGrabbing()
            camera.Close()
            camera.DestroyDevice()


def _format_name(pixel_type: int) -> str:
    """The driver's pixel type in the standard's words."""
    return str(pylon.PixelTypeMapper.GetNameByPixelType(pixel_type, pylon.Sfnc_2_0_0))
