"""Reads a live source on a thread of its own, so that a read that does not come back holds nobody up."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from flawline.camera.frame import Pixels

_QUEUE = 4  # frames that may wait; beyond that the oldest goes, and its number with it


class LiveReader:
    """Reads a live source on a thread of its own, into a short queue that drops its oldest frame when it is full."""

    def __init__(self, name: str, read: Callable[[], tuple[bool, Pixels]]) -> None:
        self._number = 0
        self._read = read
        self._frames: queue.Queue[tuple[Pixels | None, int, int]] = queue.Queue(_QUEUE)
        self._stopped = threading.Event()
        self._release: Callable[[], None] | None = None
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"read-{name}", daemon=True)
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the last frame, or since the start."""
        return time.monotonic() - self._last

    def next(self, timeout_s: float) -> tuple[Pixels | None, int, int] | None:
        """The oldest frame, when it came (monotonic ns), and its number in the stream, from 1.

        A number that is missing was dropped. (None, ...) at the stream's end; None where none came in time.
        """
        with contextlib.suppress(queue.Empty):
            return self._frames.get(timeout=timeout_s) if timeout_s > 0 else self._frames.get_nowait()
        return None

    def stop(self, release: Callable[[], None]) -> None:
        """End the thread; the source is released by it, because that must not happen while it reads."""
        self._release = release
        self._stopped.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._stopped.is_set():
            there, pixels = self._read()
            self._last = time.monotonic()
            self._number += 1
            item = (pixels if there else None, time.monotonic_ns(), self._number)
            while True:
                try:
                    self._frames.put_nowait(item)
                    break
                except queue.Full:
                    with contextlib.suppress(queue.Empty):
                        self._frames.get_nowait()
            if not there:
                break
        self._stopped.wait()
        assert self._release is not None
        self._release()
