"""A camera that replays picture files: recursive, sorted, once or in a loop."""

import os
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from flawline.camera.camera import Camera, EndOfFrames
from flawline.camera.frame import Frame, Pixels
from flawline.camera.pace import Pace
from flawline.camera.picture_size import MOST_PIXELS, picture_size
from flawline.config.errors import CameraError, ConfigError, ImageError
from flawline.config.settings_camera import CameraSettings

_MOST_BYTES_PER_PIXEL = 20  # in a file: three numbers of 16 bit, written out
_HEAD = 1 << 20  # bytes; beside the pixels
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def list_pictures(folder: Path) -> list[Path]:
    """Every picture below `folder`, sorted by path. Hidden files and folders are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_picture(path: Path, most_pixels: int = MOST_PIXELS) -> tuple[Pixels, str]:
    """The picture's pixels, (H, W) or (H, W, 3), 8 or 16 bit, and their pixel format.

    An alpha channel is dropped. Raises ImageError, naming the file, where it is missing, empty, truncated, in a form
    that is not known, or larger than `most_pixels`, which is found before it is decoded.
    """
    most_bytes = most_pixels * _MOST_BYTES_PER_PIXEL + _HEAD
    try:
        with path.open("rb") as stream:
            too_long = os.fstat(stream.fileno()).st_size > most_bytes
            data = b"" if too_long else stream.read()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if too_long:
        raise ImageError(f"{path}: has more bytes than a picture of {most_pixels / 1e6:g} megapixels")
    if not data:
        raise ImageError(f"{path}: is empty")
    if truncated(data):
        raise ImageError(f"{path}: is truncated")
    size = picture_size(data)
    if size is None:
        raise ImageError(f"{path}: is not a picture that can be decoded")
    if size[0] * size[1] > most_pixels:
        raise ImageError(
            f"{path}: has {size[0] * size[1] / 1e6:.1f} megapixels, {most_pixels / 1e6:g} are the most "
            "(worker.max_frame_mpx on a line)"
        )
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError(f"{path}: cannot be decoded: {error.err}") from error
    if pixels is None:
        raise ImageError(f"{path}: is not a picture that can be decoded")
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = np.ascontiguousarray(pixels[:, :, :3])
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{path}: has {pixels.dtype} pixels; 8 or 16 bit are needed")
    bits = pixels.dtype.itemsize * 8
    return pixels, f"Mono{bits}" if pixels.ndim == 2 else f"BGR{bits}"


def truncated(data: bytes) -> bool:
    """True for a JPEG or PNG file without its end: decoders fill the rest with grey and say nothing."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-4096:]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data[-64:]
    return False


class FolderCamera(Camera):
    """Replays the pictures of a folder. A file that cannot be read is a frame with a fault, not an end."""

    patient = True

    def __init__(self, settings: CameraSettings) -> None:
        if settings.path is None:
            raise ConfigError(f"camera {settings.name!r}: backend 'folder' needs `path`")
        self.name = settings.name
        self._folder = settings.path
        self._loop = settings.loop
        self._by_command = settings.trigger == "software"  # `hardware`: as if its line were triggered at `fps`
        self._triggers = threading.Semaphore(0)
        self._pace = Pace(None if self._by_command else settings.fps)
        self._files: list[Path] = []
        self._next = 0
        if not self._folder.is_dir():
            raise ConfigError(f"camera {self.name!r}: path {self._folder} is not a folder")
        if not list_pictures(self._folder):
            raise ConfigError(f"camera {self.name!r}: path {self._folder} holds no pictures")

    def open(self) -> None:
        """List the files; a reopened camera goes on where it was, without the triggers of before."""
        self._look()
        self._files = list_pictures(self._folder)
        self._triggers = threading.Semaphore(0)
        self._pace.restart()

    def _look(self) -> None:
        """The folder may lie on a share that is gone."""
        if not self._folder.is_dir():
            raise CameraError(f"camera {self.name!r}: the folder {self._folder} has gone")

    def grab(self, timeout_s: float) -> Frame | None:
        """The next file's picture at the set rate."""
        self._look()
        at_end = self._next >= len(self._files) and not (self._loop and self._files)
        if at_end and not self._by_command:
            raise EndOfFrames
        if self._by_command:
            if not self._triggers.acquire(timeout=timeout_s):
                return None
            if at_end:
                return None
        elif not self._pace.wait(timeout_s):
            return None
        path = self._files[self._next % len(self._files)]
        frame_id = self._next
        self._next += 1
        try:
            pixels, pixel_format = read_picture(path, self.most_pixels)
        except ImageError as error:
            return Frame(frame_id, time.time_ns(), None, fault=str(error), source=str(path))
        return Frame(frame_id, time.time_ns(), pixels, pixel_format, source=str(path))

    def trigger(self) -> None:
        """Deliver one more picture."""
        self._triggers.release()

    def close(self) -> None:
        """Nothing is held open between two frames."""

    def info(self) -> dict[str, object]:
        """How far the replay has come."""
        return {
            "model": "folder",
            "path": str(self._folder),
            "pictures": len(self._files),
            "next": self._next,
        }
