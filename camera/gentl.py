"""Cameras of any vendor through the vendor's GenTL producer (a .cti file), with harvesters."""

import ctypes
import threading
from pathlib import Path
from typing import Any

from genicam import genapi, gentl
from harvesters.core import Harvester

from flawline.camera.device_camera import Block, DeviceCamera
from flawline.camera.device_clock import NO_NUMBER
from flawline.camera.discovery import Device, choose
from flawline.camera.features import FeatureMap
from flawline.camera.genapi import GenApiFeatures
from flawline.camera.gentl_buffer import picture_of, told
from flawline.config.errors import CameraError, ConfigError, ImageError
from flawline.config.settings_camera import CameraSettings

_BUFFERS = 16
_lock = threading.RLock()
_producers: dict[Path, tuple[Harvester, int]] = {}
"""A producer may be loaded only once in a process: its cameras share it, and the last one lets it go."""


def list_devices(cti: Path) -> list[Device]:
    """Every camera that the producer sees. Raises ConfigError where the file is no producer."""
    harvester = _load(cti)
    try:
        return _devices(harvester)
    finally:
        _unload(cti)


def _load(cti: Path) -> Harvester:
    with _lock:
        harvester, users = _producers.get(cti, (None, 0))
        if harvester is None:
            _check_producer(cti)
            harvester = Harvester()
            harvester.add_file(str(cti))
            harvester.update()  # only now: it would make the cameras that are open unusable
        _producers[cti] = (harvester, users + 1)
        return harvester


def _unload(cti: Path) -> None:
    with _lock:
        harvester, users = _producers.pop(cti)
        if users > 1:
            _producers[cti] = (harvester, users - 1)
        else:
            harvester.reset()


def _check_producer(cti: Path) -> None:
    """A library that is no producer brings the process down later, so it is looked at before it is used."""
    if not cti.is_file():
        raise ConfigError(f"cti: {cti} is not a file")
    try:
        library = ctypes.CDLL(str(cti))
    except OSError as error:
        raise ConfigError(f"cti: {cti} cannot be loaded: {error}") from error
    if not hasattr(library, "GCInitLib") or not hasattr(library, "TLOpen"):
        raise ConfigError(f"cti: {cti} is not a GenTL producer")


def _devices(harvester: Harvester) -> list[Device]:
    devices = []
    for index, info in enumerate(harvester.device_info_list):
        vendor, model, serial, user_name = (
            _property(info, name) for name in ("vendor", "model", "serial_number", "user_defined_name")
        )
        access = {1: "free", 3: "held by another application", 4: "held by another application"}
        held = access.get(_property(info, "access_status"), "")
        devices.append(Device("gentl", index, vendor, model, serial, user_name, access=held))
    return devices


def _property(info: Any, name: str) -> Any:
    """What the producer says of a device; a producer need not know everything."""
    try:
        return getattr(info, name) or ""
    except gentl.GenericException:
        return ""


class GentlCamera(DeviceCamera):
    """A camera behind a GenTL producer. Pixels are a view into its buffer: no copy before the ring's."""

    vendor_errors = (gentl.GenericException, genapi.GenericException)

    def __init__(self, settings: CameraSettings) -> None:
        super().__init__(settings)
        if settings.cti is None:
            raise ConfigError(f"camera {settings.name!r}: backend 'gentl' needs `cti`, the producer's .cti file")
        self._cti = settings.cti
        self._loaded = False
        self._acquirer: Any = None
        self._buffer: Any = None
        self._map: GenApiFeatures | None = None

    def connect(self) -> tuple[Device, FeatureMap]:
        """Load the producer, choose, take control."""
        try:
            harvester = _load(self._cti)
        except ConfigError as error:
            raise ConfigError(f"camera {self.name!r}: {error}") from error
        self._loaded = True
        device = choose(self.settings, _devices(harvester), self.first)
        try:
            with _lock:
                self._acquirer = harvester.create(device.index)
        except (gentl.ResourceInUseException, gentl.AccessDeniedException) as error:
            raise CameraError(f"camera {self.name!r}: access denied: another application holds {device}") from error
        self._map = GenApiFeatures(self._acquirer.remote_device.node_map, genapi)
        return device, self._map

    def start(self) -> None:
        """Acquire into the producer's buffers; frames are fetched by `receive`, without a thread between."""
        self._acquirer.num_buffers = _BUFFERS
        self._acquirer.start()

    def receive(self, timeout_s: float) -> Block | None:
        """The next buffer; the one before is queued again."""
        self._give_back()
        assert self._map is not None
        buffer = self._acquirer.try_fetch(timeout=max(timeout_s, 0.001), is_raw=True)
        if buffer is None:
            return None
        self._buffer = buffer
        number, device_ns = _number(buffer), _device_ns(buffer)
        if not _is_complete(buffer):
            return Block(number, device_ns, None, "", fault="the producer delivered only a part of it")
        try:
            pixels, name, extent = picture_of(buffer, self._map)
        except ImageError as error:
            return Block(number, device_ns, None, "", unreadable=str(error))
        return Block(number, device_ns, pixels, name, extent if pixels.ndim == 1 else None)

    def _give_back(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.parent.queue_buffer(buffer)

    def check_alive(self) -> None:
        """Ask the camera for its width: GenTL has no other question that every camera answers."""
        assert self._map is not None
        self._map.read("Width")

    def disconnect(self) -> None:
        """Stop, give the device back, and unload the producer with its last camera."""
        acquirer, self._acquirer = self._acquirer, None
        try:
            self._give_back()
            if acquirer is not None:
                acquirer.stop()
                acquirer.destroy()
        finally:
            if self._loaded:
                self._loaded = False
                _unload(self._cti)


def _number(buffer: Any) -> int:
    """The camera's own, where the producer passes it on."""
    try:
        return int(buffer.frame_id)
    except gentl.GenericException:
        return NO_NUMBER


def _is_complete(buffer: Any) -> bool:
    """Where the producer does not say, it must say how many bytes have come: they are held against the picture's."""
    try:
        return bool(buffer.is_complete())
    except gentl.GenericException:
        return told(buffer, "size_filled") is not None


def _device_ns(buffer: Any) -> int | None:
    """The exposure's time by the camera's clock, where the producer passes it on."""
    try:
        return int(buffer.timestamp_ns) or None
    except gentl.GenericException:
        return None
