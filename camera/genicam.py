"""GigE Vision and USB3 Vision cameras without a vendor's software, through viva-genicam."""

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import numpy as np
import viva_genicam as vg

from flawline.camera.buffers import as_picture
from flawline.camera.device_camera import Block, DeviceCamera
from flawline.camera.discovery import Device, choose
from flawline.camera.features import Feature, FeatureMap, Kind, Value
from flawline.camera.frame import Pixels
from flawline.camera.gvcp import read_memory, read_register
from flawline.camera.pixel_format import name_of_code, parse
from flawline.config.errors import CameraError, ImageError
from flawline.config.settings_camera import CameraSettings

_DISCOVERY_MS = 500
_CONTROL, _SERIAL, _TICKS_HIGH, _TICKS_LOW = 0x0A00, 0x00D8, 0x093C, 0x0940
"""GigE Vision's bootstrap registers: control channel privilege, two texts of 16 bytes (serial number, user's name), and
the clock's rate."""
Identity = tuple[str, str, str]  # serial number, user name, who holds it
_UNKNOWN: Identity = ("", "", "")
_KINDS: dict[str, Kind] = {
    "Integer": "integer",
    "IntConverter": "integer",
    "Float": "float",
    "Converter": "float",
    "Enumeration": "enumeration",
    "Boolean": "boolean",
    "StringReg": "string",
    "Command": "command",
}


def list_devices() -> list[Device]:
    """Every camera that answers, on all interfaces, loopback included."""
    return [device for device, _ in _discover(details=True)]


def _discover(details: bool, serial: str | None = None) -> list[tuple[Device, Any]]:
    """Cameras and the library's handles. `details` reads serial number and user name, from all cameras at once.

    Where the camera of that `serial` answers, the others are not waited for, and theirs may be left out.
    """
    found: list[tuple[Device, Any]] = []
    handles, usb = vg.discover(_DISCOVERY_MS, all=True), _usb_handles()
    there = serial is not None and serial in [handle.serial for handle in usb]
    known = _read_identities([handle.ip for handle in handles], serial) if details and not there else {}
    for handle in handles:
        names = known.get(handle.ip, _UNKNOWN)
        vendor, model = handle.manufacturer or "", handle.model or ""
        device = Device("genicam", len(found), vendor, model, names[0], names[1], handle.ip, handle.mac, names[2])
        found.append((device, handle))
    for handle in usb:
        vendor, model, address = handle.manufacturer or "", handle.model or "", f"usb {handle.bus}-{handle.address}"
        found.append((Device("genicam", len(found), vendor, model, handle.serial or "", "", address), handle))
    return found


def _usb_handles() -> list[Any]:
    try:
        return list(vg.discover_u3v())
    except vg.TransportError:  # a machine without USB
        return []


def _read_identities(addresses: list[str], serial: str | None) -> dict[str, Identity]:
    """By address, of all at once: silent cameras do not add up. Ends with the one that has `serial`."""
    known: dict[str, Identity] = {}
    pool = ThreadPoolExecutor(max(1, len(addresses)), "gvcp")
    try:
        asked = {pool.submit(_read_identity, address): address for address in addresses}
        for answer in as_completed(asked):
            known[asked[answer]] = answer.result()
            if serial is not None and answer.result()[0] == serial:
                break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return known


def _read_identity(address: str) -> Identity:
    """Of a GigE camera, read beside whoever controls it; empty if it is silent."""
    try:
        texts = read_memory(address, _SERIAL, 32)
        held = read_register(address, _CONTROL) if texts is not None else None
    except OSError:
        return _UNKNOWN
    if texts is None:
        return _UNKNOWN
    return *_names(texts), "held by another application" if held else "free"


def _names(texts: bytes) -> tuple[str, str]:
    """Serial number and user name, from the bootstrap registers of a GigE camera, 16 bytes each."""
    serial, user_name = (
        text.split(b"\0", 1)[0].decode("utf-8", "replace").strip() for text in (texts[:16], texts[16:])
    )
    return serial, user_name


class VivaFeatures(FeatureMap):
    """The features of a camera that viva-genicam holds."""

    def __init__(self, camera: Any) -> None:
        self._camera = camera

    def names(self) -> Iterable[str]:
        """What the camera's categories list: the registers behind are left out."""
        categories = self._camera.categories()
        return sorted({name for children in categories.values() for name in children} - categories.keys())

    def feature(self, name: str) -> Feature | None:
        """Its state as the camera has it now."""
        if self._camera.node_info(name) is None:
            return None
        state = self._camera.feature_state(name)
        if not state.is_implemented:
            return None
        kind = _KINDS.get(state.kind, "other")
        low, high, step = (state.range.min, state.range.max, state.range.inc) if state.range else (None, None, None)
        entries = tuple(state.enum_entries or ())
        return Feature(name, kind, "W" in (state.access or ""), low, high, step, entries)

    def read(self, name: str) -> Value | None:
        """Its value, asked of the camera and not of a cache."""
        if self._camera.node_info(name) is None:
            return None
        self._camera.invalidate(name)
        value: Value | None = self._camera.feature_state(name).value
        return value

    def write(self, feature: Feature, value: Value) -> None:
        """Set it by its kind."""
        setters = {
            "integer": self._camera.set_integer,
            "float": self._camera.set_float,
            "enumeration": self._camera.set_enum,
            "boolean": self._camera.set_bool,
        }
        setters.get(feature.kind, self._camera.set_string)(feature.name, value)

    def execute(self, name: str) -> None:
        """Send it and go on: the camera acts on the write itself."""
        self._camera.execute(name, wait=False)


class GenicamCamera(DeviceCamera):
    """A GigE Vision or USB3 Vision camera. Frames lie in memory of their own: one copy after the network's."""

    vendor_errors = (vg.GenicamError, OSError)

    def __init__(self, settings: CameraSettings) -> None:
        super().__init__(settings)
        self._camera: Any = None
        self._stream: Any = None
        self._ns_per_tick = 1.0

    def connect(self) -> tuple[Device, FeatureMap]:
        """Ask who is there, take the one that is meant, and take control of it."""
        details = self.settings.serial is not None or self.settings.user_name is not None
        found = _discover(details, self.settings.serial)
        device = choose(self.settings, [device for device, _ in found], self.first)
        handle = found[device.index][1]
        if isinstance(handle, vg.U3vDeviceInfo):
            self._camera = vg.connect_u3v(handle)
            return device, VivaFeatures(self._camera)
        try:
            self._camera = vg.connect_gige(handle)
        except vg.TransportError as error:
            if _read_identity(handle.ip)[2].startswith("held"):
                raise CameraError(
                    f"camera {self.name!r}: access denied: another application controls {device}; "
                    "close it, or wait for its heartbeat to end"
                ) from error
            raise
        self._ns_per_tick = self._read_clock()
        serial, user_name = _names(self._camera.read_register(_SERIAL, 32))
        return replace(device, serial=serial, user_name=user_name), VivaFeatures(self._camera)

    def _read_clock(self) -> float:
        high, low = (self._camera.read_register(place, 4) for place in (_TICKS_HIGH, _TICKS_LOW))
        frequency = int.from_bytes(high + low, "big")
        return 1e9 / frequency if frequency else 0.0

    def start(self) -> None:
        """Open the stream with the largest packets that the path takes, unless GevSCPSPacketSize is set."""
        own_size = "GevSCPSPacketSize" in self.settings.features
        stream = self._camera.stream(auto_packet_size=not own_size, deliver_incomplete=True)
        self._stream = stream
        stream.__enter__()

    def receive(self, timeout_s: float) -> Block | None:
        """The next frame of the stream."""
        if self._camera.transport == "gige" and self._camera.control_state is vg.ControlState.LOST:
            raise CameraError(f"camera {self.name!r}: is lost: the camera gave control to another application")
        try:
            frame = self._stream.next_frame(max(1, round(timeout_s * 1000)))
        except vg.TransportError as error:
            if "timeout waiting for frame" in str(error):
                return None
            raise
        if frame is None:
            raise CameraError(f"camera {self.name!r}: is lost: the stream has ended")
        ticks = frame.ts_dev
        device_ns = int(ticks * self._ns_per_tick) if ticks and self._ns_per_tick else None
        name = self._format_of(frame)
        if not frame.is_complete:
            return Block(frame.block_id, device_ns, None, name, fault=_why(frame))
        try:
            pixels, name = _picture(frame, name)
        except (ImageError, vg.GenicamError) as error:
            return Block(frame.block_id, device_ns, None, name, unreadable=str(error))
        extent = (frame.height, frame.width) if pixels.ndim == 1 else None
        return Block(frame.block_id, device_ns, pixels, name, extent)

    def _format_of(self, frame: Any) -> str:
        """What the frame's head calls it; where the library does not know the code, PFNC does, or the camera."""
        name: str = frame.pixel_format
        return (name_of_code(frame.pixel_format_code) or self.pixel_format or name) if _is_unknown(name) else name

    def check_alive(self) -> None:
        """Read who controls the camera: nobody answers where it is gone, nobody controls it where it was restarted."""
        if self._camera.transport != "gige":
            self._camera.read_register(0, 4)
        elif self.device is not None and read_register(self.device.address, _CONTROL) == 0:
            raise CameraError(f"camera {self.name!r}: is lost: it has been restarted")

    def disconnect(self) -> None:
        """Stop the stream, give control back."""
        stream, self._stream = self._stream, None
        camera, self._camera = self._camera, None
        if stream is not None:
            with contextlib.suppress(vg.GenicamError):
                if self.lost:
                    stream.close()
                else:
                    stream.__exit__(None, None, None)
        if camera is not None:
            camera.close()

    def counters(self) -> dict[str, int]:
        """Of the stream that is open now: packets, and those that were asked for again."""
        stats = self._stream.stats()
        return {
            "packets": stats.packets_received,
            "packets_missing": stats.packets_missing,
            "packets_resent": stats.resend_recovered,
        }


def _why(frame: Any) -> str:
    match frame.status:
        case vg.FrameStatus.INCOMPLETE:
            return f"{frame.missing_packets} packets did not arrive"
        case vg.FrameStatus.DEVICE_STATUS:
            return f"the camera reports status {frame.device_status:#06x}"
        case _:
            return "its end did not arrive"


def _is_unknown(name: str) -> bool:
    return name.startswith("Unknown(")


def _picture(frame: Any, name: str) -> tuple[Pixels, str]:
    """The pixels and the format they lie in: the library unpacks packed ones, and turns BGR into RGB.

    One that it does not know, it hands over as it came.
    """
    known = parse(name)
    if _is_unknown(frame.pixel_format) or known.kind == "yuv422" or (known.kind in ("rgb", "bgr") and known.bits > 8):
        data = np.frombuffer(frame.payload(), np.uint8)
        return as_picture(data, name, frame.height, frame.width, frame.padding_x), name
    pixels: Pixels = frame.to_numpy()
    if pixels.ndim == 1:
        return as_picture(pixels.view(np.uint8), name, frame.height, frame.width, frame.padding_x), name
    if known.kind in ("rgb", "bgr"):
        return pixels, "RGB8"
    colour = f"Bayer{known.pattern}" if known.kind == "bayer" else "Mono"
    return pixels, f"{colour}{known.bits}"
