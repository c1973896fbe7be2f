"""The shared-memory ring that carries frames to the worker and masks back; queues carry slot numbers only.

The memory is an anonymous memfd: it has no name, so nothing can be left behind, whoever is killed and how.
Its pages come into being when they are written, so slots for the largest frame cost what the real frames need.

A slot holds, one after the other: the picture (H, W, 3) uint8 RGB, the mask (H, W) uint8 0 or 255, and the
anomaly map (H, W) uint8, 255 standing for 1.0, and a second mask plane for a refinement that follows a
degraded verdict, so that the first mask stays what it was while it is being sent.
"""

import contextlib
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import RingError

_PLANES = 6  # bytes per pixel: three of the picture, one of the mask, one of the map, one of the refined mask
_PAGE = mmap.PAGESIZE


class SlotViews:
    """Views of the planes of slots; both processes have one over the same memory."""

    def __init__(self, fd: int, slots: int, max_pixels: int) -> None:
        self.slots = slots
        self.max_pixels = max_pixels
        self._stride = -(-max_pixels * _PLANES // _PAGE) * _PAGE
        size = os.fstat(fd).st_size
        if size != self._stride * slots:
            raise RingError(f"the frame ring has {size} bytes, {self._stride * slots} were expected")
        self._memory = mmap.mmap(fd, size)
        self._bytes = np.frombuffer(self._memory, np.uint8)

    def _plane(self, slot: int, offset: int, shape: tuple[int, ...], pixels: int) -> NDArray[np.uint8]:
        if not 0 <= slot < self.slots:
            raise RingError(f"slot {slot} is outside the frame ring of {self.slots}")
        if pixels > self.max_pixels:
            raise RingError(
                f"a frame of {pixels / 1e6:.1f} megapixels is larger than worker.max_frame_mpx = "
                f"{self.max_pixels / 1e6:g}"
            )
        start = slot * self._stride + offset
        return self._bytes[start : start + int(np.prod(shape))].reshape(shape)

    def picture(self, slot: int, height: int, width: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB."""
        return self._plane(slot, 0, (height, width, 3), height * width)

    def mask(self, slot: int, height: int, width: int, *, refined: bool = False) -> NDArray[np.uint8]:
        """(H, W) uint8, 0 or 255."""
        return self._plane(slot, (5 if refined else 3) * height * width, (height, width), height * width)

    def anomaly_map(self, slot: int, height: int, width: int) -> NDArray[np.uint8]:
        """(H, W) uint8, 255 for 1.0."""
        return self._plane(slot, 4 * height * width, (height, width), height * width)

    def close(self) -> None:
        """Let go of the memory; views handed out before keep theirs alive until they are gone."""
        self._bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # a view is still in use; the mapping goes with the last one
            self._memory.close()


class FrameRing(SlotViews):
    """The owner's side: makes the memory and hands out slots, newest used first, so that few pages stay warm.

    `acquire` and `release` may be called from any thread.
    """

    def __init__(self, slots: int, max_pixels: int) -> None:
        self.fd = os.memfd_create("flawline-frames", os.MFD_CLOEXEC)
        stride = -(-max_pixels * _PLANES // _PAGE) * _PAGE
        try:
            os.ftruncate(self.fd, stride * slots)
            super().__init__(self.fd, slots, max_pixels)
        except OSError as error:
            os.close(self.fd)
            raise RingError(f"no memory for {slots} frames of {max_pixels / 1e6:g} megapixels: {error}") from error
        self._free = list(range(slots - 1, -1, -1))
        self._lock = threading.Lock()

    def acquire(self) -> int | None:
        """A free slot's number, or None if every slot is in use."""
        with self._lock:
            return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        """Give a slot back. Giving one back twice is an error, because two frames would share it."""
        with self._lock:
            if slot in self._free or not 0 <= slot < self.slots:
                raise RingError(f"slot {slot} was given back twice or never existed")
            self._free.append(slot)

    @property
    def in_use(self) -> int:
        """How many slots are handed out."""
        with self._lock:
            return self.slots - len(self._free)

    def close(self) -> None:
        """Free the memory once no one maps it any more."""
        super().close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
