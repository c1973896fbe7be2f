"""V4L2 devices, RTSP and HTTP streams, and video files, through OpenCV."""

import contextlib
import queue
import time
from pathlib import Path
from typing import Any

import cv2
import structlog

from flawline.camera import v4l2
from flawline.camera.camera import Camera, EndOfFrames
from flawline.camera.discovery import Device
from flawline.camera.frame import Frame, Pixels
from flawline.camera.live_reader import LiveReader
from flawline.camera.pace import Pace
from flawline.camera.stream_format import note_of_tag
from flawline.config.errors import CameraError, ConfigError
from flawline.config.passwords import bare_address
from flawline.config.settings_camera import CameraSettings

log = structlog.get_logger()
_PIXELS_OF_DEVICE, _PIXELS_OF_STREAM = cv2.CAP_PROP_FOURCC, cv2.CAP_PROP_CODEC_PIXEL_FORMAT


def list_devices(nodes: Path = Path("/sys/class/video4linux")) -> list[Device]:
    """The V4L2 devices of this machine, `index` being the number of the node: /dev/video{index}.

    Streams and files are not announced by anybody.
    """
    numbered = [(int(node.name[5:]), node) for node in nodes.glob("video*") if node.name[5:].isdecimal()]
    return [
        Device("opencv", index, model=_model(node), address=f"/dev/{node.name}") for index, node in sorted(numbered)
    ]


def _model(node: Path) -> str:
    """What the driver calls itself; empty where the device has gone meanwhile."""
    try:
        return (node / "name").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


class OpencvCamera(Camera):
    """A video source. A live one is read by a thread of its own, because OpenCV's `read` cannot be given up.

    A software trigger takes the next frame that arrives after it; these sources have no exposure by command. A stream
    that runs freely is owed an answer for each of its frames: one that was dropped, because nobody took it in time,
    comes out of `grab` as a frame of its own, `lost`. Where `fps` thins the stream out, what it leaves is not owed one.
    """

    def __init__(self, settings: CameraSettings) -> None:
        self.name = settings.name
        self._settings = settings
        sources = [key for key in ("url", "path", "index") if getattr(settings, key) is not None]
        if len(sources) != 1:
            raise ConfigError(
                f"camera {self.name!r}: backend 'opencv' needs one of url, path and index, not {len(sources)} of them"
            )
        if settings.trigger == "hardware":
            raise ConfigError(f"camera {self.name!r}: backend 'opencv' has no hardware trigger")
        self._is_file = settings.path is not None
        self.patient = self._is_file  # a stream does not wait
        self._source = str(settings.path or settings.url or f"/dev/video{settings.index}")
        self._shown = bare_address(self._source)  # a password may stand anywhere in it
        self._is_device = self._source.startswith("/dev/")
        if self._is_file and not settings.path.is_file():  # type: ignore[union-attr]
            raise ConfigError(f"camera {self.name!r}: path {settings.path} is not a file")
        if settings.features and not self._is_device:
            raise ConfigError(f"camera {self.name!r}: features are for V4L2 devices; {self._shown} takes none")
        self._by_command = settings.trigger == "software"
        self._triggers: queue.SimpleQueue[int] = queue.SimpleQueue()  # monotonic ns of each
        self._triggered: int | None = None  # the one that waits for its frame
        self._capture: Any = None
        self._reader: LiveReader | None = None
        self._pace = Pace(None)
        self._frame_id = self._position = 0
        self._number = 0  # the last frame of the stream that is open now
        self._owed = 0  # dropped before the frame that is held
        self._held: tuple[Pixels | None, int] | None = None
        self._size: tuple[int, int] = (0, 0)
        self._counts = {"frames": 0, "missed": 0, "skipped": 0, "opened": 0}

    def open(self) -> None:
        """Open the source. Raises CameraError where nobody answers or it holds no video."""
        settings = self._settings
        self._triggers, self._triggered = queue.SimpleQueue(), None  # those of before have been answered
        patience = int(settings.stall_s * 1000)
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, patience, cv2.CAP_PROP_READ_TIMEOUT_MSEC, patience]
        if self._is_device:
            self._capture = cv2.VideoCapture(self._source, cv2.CAP_V4L2)
        else:
            self._capture = cv2.VideoCapture(self._source, cv2.CAP_FFMPEG, timeouts)
        if not self._capture.isOpened():
            self.close()
            raise CameraError(f"camera {self.name!r}: {self._shown} cannot be opened")
        v4l2.configure(self.name, self._source, self._capture, settings.features)
        self.note = note_of_tag(int(self._capture.get(_PIXELS_OF_DEVICE if self._is_device else _PIXELS_OF_STREAM)))
        if self._is_file:
            self._pace = Pace(None if self._by_command else settings.fps)
            if self._position:  # opened again: a file goes on where it was
                self._capture.set(cv2.CAP_PROP_POS_FRAMES, self._position)
        else:
            self._pace = Pace(settings.fps)
            self._number, self._owed, self._held = 0, 0, None
            self._reader = LiveReader(self.name, self._capture.read)
        self._counts["opened"] += 1
        if self._counts["opened"] == 1:  # not at every try to have a lost one back
            log.info("camera_open", camera=self.name, device=self._shown, trigger=settings.trigger)

    def grab(self, timeout_s: float) -> Frame | None:
        """The next frame: of a file at the set rate, of a stream as it comes."""
        if self._capture is None:
            raise CameraError(f"camera {self.name!r}: is not open")
        return self._from_file(timeout_s) if self._is_file else self._from_stream(timeout_s)

    def _from_file(self, timeout_s: float) -> Frame | None:
        if self._by_command:
            try:
                self._triggers.get(timeout=timeout_s)
            except queue.Empty:
                return None
        elif not self._pace.wait(timeout_s):
            return None
        there, pixels = self._capture.read()
        if not there and self._settings.loop:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            self._position = 0
            there, pixels = self._capture.read()
        if not there:
            if self._by_command:
                return None
            raise EndOfFrames
        self._position += 1
        return self._frame(pixels, time.monotonic_ns())

    def _from_stream(self, timeout_s: float) -> Frame | None:
        if self._held is not None:
            return self._from_held()
        assert self._reader is not None
        deadline = time.monotonic() + timeout_s
        while True:
            item = self._reader.next(max(0.0, deadline - time.monotonic()))
            if item is None:
                if self._reader.silent_s > self._settings.stall_s:
                    raise CameraError(
                        f"camera {self.name!r}: {self._shown} has sent no frame for {self._settings.stall_s:g} s"
                    )
                return None
            pixels, arrived, number = item
            # What had piled up before the first frame of an acquisition was taken is from before it.
            dropped = number - self._number - 1 if self._number else 0
            self._number = number
            self._counts["missed"] += dropped
            if pixels is None:
                pass  # the end
            elif self._by_command:
                if not self._is_asked_for(arrived):
                    continue
            elif self._settings.fps and not self._pace.wait(0.0):
                self._counts["skipped"] += 1  # the source is faster than asked for
                continue
            self._owed = 0 if self._by_command or self._settings.fps else dropped
            self._held = pixels, arrived
            return self._from_held()

    def _from_held(self) -> Frame:
        """One of those that were dropped before it, or, after them, itself."""
        assert self._held is not None
        if self._owed:
            self._owed -= 1
            self._frame_id += 1
            fault = (
                f"camera {self.name!r}: frame {self._frame_id} was dropped: the agent was too busy to take it in time"
            )
            return Frame(self._frame_id, time.time_ns(), None, fault=fault, fault_reason="overrun", lost=True)
        (pixels, arrived), self._held = self._held, None
        if pixels is None:
            raise CameraError(f"camera {self.name!r}: {self._shown} has ended or was cut off")
        return self._frame(pixels, arrived)

    def _is_asked_for(self, arrived: int) -> bool:
        """True for the first frame after a trigger; that trigger is then answered."""
        if self._triggered is None:
            with contextlib.suppress(queue.Empty):
                self._triggered = self._triggers.get_nowait()
        if self._triggered is None or arrived < self._triggered:
            return False
        self._triggered = None
        return True

    def _frame(self, pixels: Pixels, arrived: int) -> Frame:
        self._frame_id += 1
        self._counts["frames"] += 1
        self._size = (pixels.shape[0], pixels.shape[1])
        t_grab = time.time_ns() - (time.monotonic_ns() - arrived)
        pixel_format = "BGR8" if pixels.ndim == 3 else "Mono8"
        return Frame(self._frame_id, t_grab, pixels, pixel_format, mono_grab=arrived)

    def trigger(self) -> None:
        """Take the next frame that arrives; of a file, the next one."""
        if not self._by_command:
            raise CameraError(f"camera {self.name!r}: trigger = {self._settings.trigger!r} takes no software trigger")
        self._triggers.put(time.monotonic_ns())

    def close(self) -> None:
        """Let go of the source. The reading thread ends with its present read, within `stall_s`."""
        capture, self._capture = self._capture, None
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.stop(capture.release)
        elif capture is not None:
            capture.release()

    def info(self) -> dict[str, Any]:
        """The source, the picture's size, and what was counted since the start of the program."""
        return {
            "up": self._capture is not None,
            "backend": "opencv",
            "address": self._shown,
            "height": self._size[0],
            "width": self._size[1],
            "clock": "host",
            **self._counts,
        }
