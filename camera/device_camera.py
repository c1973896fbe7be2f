"""What the GenICam backends have in common: configure, count, map the clock, answer what was lost, notice silence."""

import contextlib
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import structlog

from flawline.camera.camera import Camera
from flawline.camera.configure import configure
from flawline.camera.device_clock import BlockNumbers, DeviceClock
from flawline.camera.discovery import Device
from flawline.camera.features import FeatureMap
from flawline.camera.frame import Frame, Pixels
from flawline.camera.pixel_format import parse
from flawline.config.errors import CameraError, ConfigError, ImageError
from flawline.config.settings_camera import CameraSettings

log = structlog.get_logger()
_COUNT_EVERY_S = 1.0
_READY_S = 0.5  # an exposure and its readout
_ASK_AGAIN_S = 0.001
_LOOK_AFTER_S = 1.0  # after so long a silence the device is asked whether it is still there


@dataclass(frozen=True, slots=True)
class Block:
    """What the driver hands over for one exposure."""

    block_id: int
    device_ns: int | None  # the camera's clock; None where it has none
    pixels: Pixels | None
    pixel_format: str
    extent: tuple[int, int] | None = None  # height and width where `pixels` is packed bytes
    fault: str | None = None  # in words, where the transfer was not complete
    unreadable: str | None = None  # in words, where it was, but what came is no picture that can be judged


class DeviceCamera(Camera):
    """A camera behind a vendor's library. A backend says how to connect, start, receive and let go.

    Every block number that is missing between two frames comes out of `grab` as a frame of its own, `lost`, with a
    fault: a part went by, and it is owed an answer.
    """

    vendor_errors: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, settings: CameraSettings) -> None:
        self.name = settings.name
        self.settings = settings
        self.device: Device | None = None
        self.first: Device | None = None  # the one that was opened the first time
        self._features: FeatureMap | None = None
        self._blocks = BlockNumbers()
        self._clock = DeviceClock()
        self._has_clock = False
        self._owed: list[int] = []
        self._held: Block | None = None
        self._exposed = 0  # when the one that is held was, monotonic ns
        self._readiness: Literal["untold", "asked", "told"] = "untold"
        self.pixel_format: str | None = None  # as the camera told it when it was opened
        self._was_open = False
        self._said = ""
        self._stall_s = settings.stall_s
        self.lost = False  # a lost device is let go without a word to it, which would only be waited for
        self._heard = self._looked = self._counted = 0.0
        self._library: dict[str, int] = {}
        self._counts = {"frames": 0, "incomplete": 0, "unreadable": 0, "opened": 0}
        self._picture: dict[str, Any] = {}

    # -- a backend's part -------------------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> tuple[Device, FeatureMap]:
        """Find the device and take control of it. Raises CameraError, ConfigError."""

    @abstractmethod
    def start(self) -> None:
        """Begin acquisition."""

    @abstractmethod
    def receive(self, timeout_s: float) -> Block | None:
        """The next block, None after `timeout_s`. Its pixels are valid until the next call."""

    @abstractmethod
    def check_alive(self) -> None:
        """Raise CameraError, or one of `vendor_errors`, where the device is gone or under another's control."""

    @abstractmethod
    def disconnect(self) -> None:
        """Stop and let go, whatever state it is in. What it raises is ignored."""

    def is_ready_within(self, timeout_s: float) -> bool:
        """Wait until the camera takes a trigger. Called by the thread that triggers. True where it does not tell.

        Asks AcquisitionStatus, which `open` has set to FrameTriggerWait. A camera that has not once said that it waits
        is taken not to tell: it is asked no more until it is opened again.
        """
        features, deadline = self._features, time.monotonic() + timeout_s
        while features is not None and self._readiness != "untold":
            if features.read("AcquisitionStatus"):
                self._readiness = "told"
                return True
            if time.monotonic() >= deadline:
                if self._readiness == "told":
                    return False
                self._readiness = "untold"
                log.warning("camera_readiness_unknown", camera=self.name, note="AcquisitionStatus never says it waits")
                break
            time.sleep(_ASK_AGAIN_S)
        return True

    def counters(self) -> dict[str, int]:
        """The library's own counters. Asked once a second by the camera's own thread: a library may allow no other."""
        return {}

    # -- the lifecycle ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def vendor(self, doing: str) -> Iterator[None]:
        """Map the library's exceptions to CameraError."""
        try:
            yield
        except self.vendor_errors as error:
            words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            words = " ".join(words.split()) or type(error).__name__
            raise CameraError(f"camera {self.name!r}: {doing}: {words}") from error

    def open(self) -> None:
        """Connect, configure, start. A setting that the camera refuses is a ConfigError, but only at the first open:
        later it may be another camera in the same place, and the line goes on without it."""
        try:
            with self.vendor("connecting"):
                self.device, features = self.connect()
            with self.vendor("configuring"):
                configure(self.settings, features)
                self._check_pixel_format(features)
                self._stall_s = self._longest_silence_s(features)
                self._readiness = "asked" if self._can_tell_readiness(features) else "untold"
            self._features = features
            self._blocks.restart()
            self._clock = DeviceClock()  # a power cycle leaves it another count, which need not lie before the old one
            self._owed, self._held = [], None
            with self.vendor("starting acquisition"):
                self.start()
        except ConfigError as error:
            self.close()
            if self._was_open:
                raise CameraError(str(error)) from error
            raise
        except CameraError:
            self.close()
            raise
        if self.first is None:
            self.first = self.device
            if self.settings.index is not None:
                note = "a place in the list is no identity; it stays this camera until a restart: name it by serial"
                log.warning("camera_chosen_by_index", camera=self.name, device=str(self.device), note=note)
        self._was_open, self.lost = True, False
        self._counts["opened"] += 1
        self._heard = self._looked = time.monotonic()
        if (device := str(self.device)) != self._said:  # not at every try to have a lost one back
            self._said = device
            log.info("camera_open", camera=self.name, device=device, trigger=self.settings.trigger)

    def _longest_silence_s(self, features: FeatureMap) -> float:
        """`stall_s`, but at least what two frames take where they are asked for more slowly."""
        table = self.settings.features
        rates = (self.settings.fps, table.get("AcquisitionFrameRate"), table.get("AcquisitionFrameRateAbs"))
        rate = next((float(rate) for rate in rates if rate is not None), 0.0)
        exposure = features.read("ExposureTime") or features.read("ExposureTimeAbs") or 0.0  # us
        return max(self.settings.stall_s, (2 / rate if rate > 0 else 0.0) + 2 * float(exposure) / 1e6)

    def _can_tell_readiness(self, features: FeatureMap) -> bool:
        """Whether AcquisitionStatus now says that the camera waits for a frame's trigger."""
        if self.settings.trigger != "software" or features.feature("AcquisitionStatus") is None:
            return False
        selector = features.feature("AcquisitionStatusSelector")
        if selector is None or "FrameTriggerWait" not in selector.entries:
            return False
        if selector.writable:
            features.write(selector, "FrameTriggerWait")
        return features.read(selector.name) == "FrameTriggerWait"

    def _check_pixel_format(self, features: FeatureMap) -> None:
        """Raises ConfigError for a format that cannot be judged."""
        try:
            name = features.read("PixelFormat")
        except self.vendor_errors:
            name = None
        self.pixel_format = name if isinstance(name, str) else None
        if not isinstance(name, str):
            self.note = "the camera does not let PixelFormat be read: what its frames say of themselves is believed"
            return
        self.note = None
        try:
            parse(name)
        except ImageError as error:
            offer = features.feature("PixelFormat")
            good = [entry for entry in (offer.entries if offer else ()) if _is_known(entry)]
            raise ConfigError(
                f"camera {self.name!r}: features.PixelFormat = {name!r} cannot be judged; "
                f"of what the camera offers, these can: {', '.join(good) or 'none'}"
            ) from error

    def grab(self, timeout_s: float) -> Frame | None:
        """The next frame, or the fault of one that was lost before it."""
        if self._features is None:
            raise CameraError(f"camera {self.name!r}: is not open")
        if self._held is None:
            try:
                with self.vendor("receiving"):
                    self._held = self.receive(timeout_s)
                    self._count()
                if self._held is None:
                    self._after_silence()
                    return None
            except CameraError:
                self.lost = True
                raise
            self._heard = self._looked = time.monotonic()
            arrived, device_ns = time.monotonic_ns(), self._held.device_ns
            self._exposed = arrived if device_ns is None else self._clock.to_monotonic(device_ns, arrived)
            self._owed = self._blocks.gap(self._held.block_id)
            self._held = replace(self._held, block_id=self._blocks.name(self._held.block_id))
        now = time.time_ns()
        if self._owed:
            number = self._owed.pop(0)
            fault = f"camera {self.name!r}: frame {number} was lost on its way"
            return Frame(
                number, now, None, fault=fault, fault_reason="camera_fault", lost=True, mono_grab=self._exposed
            )
        block, self._held = self._held, None
        return self._frame(block, now)

    def _count(self) -> None:
        now = time.monotonic()
        if now - self._counted >= _COUNT_EVERY_S:
            self._counted = now
            self._library = self.counters()

    def _frame(self, block: Block, now: int) -> Frame:
        self._counts["frames"] += 1
        self._has_clock = clocked = block.device_ns is not None
        mono = self._exposed
        t_grab = now - (time.monotonic_ns() - mono)
        why = block.fault or block.unreadable
        if why is not None:
            self._counts["incomplete" if block.fault else "unreadable"] += 1
            what = "is incomplete" if block.fault else "cannot be judged"
            fault = f"camera {self.name!r}: frame {block.block_id} {what}: {why}"
            kind = block.pixel_format
            return Frame(
                block.block_id,
                t_grab,
                None,
                kind,
                fault,
                fault_reason="camera_fault",
                clocked=clocked,
                mono_grab=mono,
            )
        frame = Frame(
            block.block_id,
            t_grab,
            block.pixels,
            block.pixel_format,
            extent=block.extent,
            clocked=clocked,
            mono_grab=mono,
        )
        self._picture = {"height": frame.size[0], "width": frame.size[1], "pixel_format": block.pixel_format}
        return frame

    def _after_silence(self) -> None:
        now = time.monotonic()
        if now - self._looked >= _LOOK_AFTER_S:
            self._looked = now
            with self.vendor("is lost"):
                self.check_alive()
        if self.settings.trigger == "free" and now - self._heard >= self._stall_s:
            raise CameraError(
                f"camera {self.name!r}: answers, but has sent no frame for {self._stall_s:g} s "
                "(packet size, firewall, or bandwidth)"
            )

    def await_readiness(self) -> None:
        """Half a second at most: CameraError where the camera is not ready for a trigger by then."""
        with self.vendor("software trigger"):
            if not self.is_ready_within(_READY_S):
                raise CameraError(
                    f"camera {self.name!r}: software trigger: not ready for one within {_READY_S * 1000:g} ms"
                )

    def trigger(self) -> None:
        """One exposure, by the command TriggerSoftware."""
        if self.settings.trigger != "software":
            raise CameraError(f"camera {self.name!r}: trigger = {self.settings.trigger!r} takes no software trigger")
        features = self._features
        if features is None:
            raise CameraError(f"camera {self.name!r}: is not connected")
        with self.vendor("software trigger"):
            features.execute("TriggerSoftware")

    def close(self) -> None:
        """Stop and let go. Frames handed out before are no longer valid."""
        self._features = None
        self._held = None
        with contextlib.suppress(CameraError, *self.vendor_errors):
            self.disconnect()

    def info(self) -> dict[str, Any]:
        """The device, the picture's form, and what was counted since the start of the program."""
        device = self.device.table() if self.device else {"backend": self.settings.backend}
        return {
            "up": self._features is not None,
            **device,
            **self._picture,
            "clock": "camera" if self._has_clock else "host",
            **self._counts,
            "missed": self._blocks.missed,
            "renumbered": self._blocks.renumbered,
            **self._library,
        }


def _is_known(pixel_format: str) -> bool:
    try:
        parse(pixel_format)
    except ImageError:
        return False
    return True
