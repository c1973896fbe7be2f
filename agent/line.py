"""One camera of the station with what waits at it, and how a frame gets from its driver into a slot of the ring."""

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from flawline.agent.verdict import Job, Reason
from flawline.agent.wire import Header
from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.guard import Guard
from flawline.camera.pixel_format import depth_note
from flawline.camera.pixels import to_rgb8
from flawline.camera.ring import FrameRing
from flawline.config.errors import ImageError, RingError
from flawline.config.settings_camera import CameraSettings

log = structlog.get_logger()
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between two tries to open a lost camera
GRAB_S = 0.25
"""A camera's thread looks up so often to see whether it should go on."""

_LAGS, _ENOUGH_LAGS = 64, 8
_SLACK_NS = 1_000_000


@dataclass(slots=True)
class Shot:
    """A frame in its slot, or what is wrong with it; then it has none."""

    frame: Frame
    slot: int | None = None
    height: int = 0
    width: int = 0
    trouble: tuple[Reason, str] | None = None


@dataclass(eq=False)
class Line:
    """Everything but `grab` is used on the event loop."""

    camera: Camera
    settings: CameraSettings
    state: str = "closed"  # closed, up, lost, ended
    tried: asyncio.Event = field(default_factory=asyncio.Event)  # it was opened, or has failed to
    out_of_step: bool = False
    out_of_step_said: bool = False  # in the log, until a trigger has got its frame
    pause_s: float = FIRST_PAUSE_S  # before the next try to open it, while it is lost
    pending: deque[Job] = field(default_factory=deque)  # triggers whose frame has not come, oldest first
    announced: deque[Job] = field(default_factory=deque)  # parts whose hardware trigger is to come, oldest first
    without_frame: deque[Job] = field(default_factory=lambda: deque(maxlen=_LAGS))
    """Announced parts that were answered without a frame, oldest first, since the last frame: a number that turns out
    to be lost may have been theirs."""
    lags: deque[int] = field(default_factory=lambda: deque(maxlen=_LAGS))
    """ns from a trigger sent to its exposure, of those that nothing else was pending beside: they alone are certain."""
    on_their_way: int = 0
    frames: int = 0
    seen_mono: float = field(default_factory=time.monotonic)  # its task came round: nothing hangs in the driver
    error: str | None = None
    trigger_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "trigger"))

    def __post_init__(self) -> None:
        self._guard = Guard(self.settings)
        self._formats: dict[str, str | None] = {}  # each that was seen: what of it is lost before it is judged
        self._format = ""

    @property
    def name(self) -> str:
        """The camera's."""
        return self.settings.name

    @property
    def up(self) -> bool:
        """It delivers frames."""
        return self.state == "up" and not self.out_of_step

    def is_up(self) -> None:
        """It is open; one that was lost and runs freely has sent a frame as well."""
        if self.state == "lost":
            log.info("camera_back", camera=self.name)
        self.state, self.pause_s = "up", FIRST_PAUSE_S
        if not self.out_of_step_said:
            self.error = None

    def is_lost(self, why: str) -> None:
        """Say it once, until it is up again."""
        if self.state != "lost":
            log.error("camera_lost", camera=self.name, error=why)
        self.state, self.error = "lost", why
        self.lags.clear()  # it may come back with another clock

    def lose_step(self, why: str) -> None:
        """A frame stayed away: the camera is to be opened anew. Said once, until a trigger has got its frame."""
        if not self.out_of_step_said:
            log.error("camera_out_of_step", camera=self.name, waiting=len(self.pending), error=why)
        self.out_of_step, self.out_of_step_said, self.error = True, True, why
        self.lags.clear()

    def answer(self, frame: Frame) -> Job:
        """The trigger that a frame which has come belongs to: the oldest that waits."""
        if self.out_of_step_said:
            log.info("camera_in_step", camera=self.name)
        self.out_of_step_said, self.error = False, None
        job = self.pending.popleft()
        alone = not self.pending or self.pending[0].sent_mono is None
        if frame.clocked and job.sent_mono is not None and alone:
            self.lags.append(frame.mono_grab - job.sent_mono)
        return job

    def has_ignored_one(self, frame: Frame) -> bool:
        """The frame may be of the second oldest trigger: then the oldest was ignored, or its frame was lost.

        So it is where the frame was exposed after that one was sent. By a camera's own clock, once some lags are
        known, it is not where the frame comes as long after the oldest as frames do, and too soon for the second.
        Of a frame known only by the gap in the numbers nobody knows when it was exposed.
        """
        if not self.camera.loses_triggers or frame.lost or len(self.pending) < 2:
            return False
        first, second = self.pending[0].sent_mono, self.pending[1].sent_mono
        if second is None or frame.mono_grab - round(self.settings.transfer_ms * 1e6) < second - _SLACK_NS:
            return False
        if not frame.clocked or len(self.lags) < _ENOUGH_LAGS or first is None:
            return True
        least, most = min(self.lags), max(self.lags)
        late = frame.mono_grab - first > most + (most - least) + _SLACK_NS
        return late or frame.mono_grab - second >= least - _SLACK_NS

    def grab(self, ring: FrameRing) -> Shot | None:
        """On the camera's thread: the next frame, copied once, from the driver's buffer into its slot."""
        frame = self.camera.grab(GRAB_S)
        if frame is None:
            return None
        if frame.pixels is None:
            return Shot(frame, trouble=(frame.fault_reason, frame.fault or "no picture"))
        slot = ring.acquire()
        if slot is None:
            return Shot(frame, trouble=("overrun", "every slot of the frame ring is in use"))
        height, width = frame.size
        try:
            picture = ring.picture(slot, height, width)
            to_rgb8(frame.pixels, frame.pixel_format, picture)
            self._note_format(frame.pixel_format)
            self._guard.check(picture, frame.pixel_format)
        except (ImageError, RingError) as error:
            ring.release(slot)
            return Shot(frame, trouble=("bad_frame", f"{frame.source or self.name}: {error}"))
        except Exception as error:  # no memory for a conversion, most of all: the slot and the frame's verdict are owed
            ring.release(slot)
            log.exception("frame_failed", camera=self.name)
            return Shot(frame, trouble=("internal", f"{type(error).__name__}: {error}"))
        return Shot(frame, slot, height, width)

    def _note_format(self, pixel_format: str) -> None:
        """No bits are lost without a word: once for each format."""
        self._format = pixel_format
        if pixel_format not in self._formats:
            note = "; ".join(filter(None, (self.camera.note, depth_note(pixel_format)))) or None
            self._formats[pixel_format] = note
            if note:
                log.info("camera_depth", camera=self.name, pixel_format=pixel_format, note=note)

    def device(self) -> Header:
        """What the camera says of itself, the format of its last picture, and what of that is lost."""
        seen = {"pixel_format": self._format, "note": self._formats.get(self._format)} if self._format else {}
        return self.camera.info() | seen

    def status(self) -> Header:
        """For the status message."""
        return {
            "state": self.state,
            "up": self.up,
            "trigger": self.settings.trigger,
            "backend": self.settings.backend,
            "frames": self.frames,
            "pending": len(self.pending) + len(self.announced),
            "error": self.error,
        }
