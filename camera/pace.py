"""The clock of a free-running source that has no clock of its own."""

import time


class Pace:
    """Lets one frame through every 1/fps seconds, without drift; at once where there is no rate."""

    def __init__(self, fps: float | None) -> None:
        self._period = 0.0 if fps is None else 1.0 / fps
        self._due = time.monotonic()

    def restart(self) -> None:
        """The next frame is due now."""
        self._due = time.monotonic()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the next frame is due, at most `timeout_s`. True if it is due."""
        now = time.monotonic()
        if self._due - now > timeout_s:
            time.sleep(timeout_s)
            return False
        if self._due > now:
            time.sleep(self._due - now)
        # A source that was held up goes on from now: it does not rush to make good the lost frames.
        self._due = max(self._due + self._period, time.monotonic() - self._period)
        return True
