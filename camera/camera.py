"""The one lifecycle that every camera backend has: open, grab again and again, close."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from flawline.camera.frame import Frame
from flawline.camera.picture_size import MOST_PIXELS


class EndOfFrames(Exception):
    """Raised by `grab` when a camera that replays a finite source has delivered its last frame."""


class Camera(ABC):
    """A camera. Every method blocks and is called from one thread, the camera's own.

    A lost device raises CameraError from `grab`; the caller closes it and opens it again later, so `open`
    after `close` must work as often as wanted. `close` is idempotent and never raises.
    """

    patient: bool = False
    """True where the source waits without loss while the inspection is busy (files do, a line does not)."""

    note: str | None = None
    """What the source loses before a frame is handed over, or does not tell of it, in words. Set by `open`."""

    most_pixels: int = MOST_PIXELS
    """A picture that is larger is not wanted, and not decoded where its file says so. Set by who makes the camera."""

    name: str

    @abstractmethod
    def open(self) -> None:
        """Connect and start acquisition. Raises CameraError or ConfigError, naming the camera."""

    @abstractmethod
    def grab(self, timeout_s: float) -> Frame | None:
        """The next frame, or None if none came within `timeout_s`. Raises CameraError, EndOfFrames."""

    def trigger(self) -> None:
        """Make one exposure (software trigger). Thread-safe: may be called while `grab` waits."""
        raise NotImplementedError(f"camera {self.name!r} has no software trigger")

    @abstractmethod
    def close(self) -> None:
        """Stop acquisition and let go of the device."""

    def info(self) -> dict[str, Any]:
        """What is known about the device: model, serial number, size, pixel format, counters."""
        return {}

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
