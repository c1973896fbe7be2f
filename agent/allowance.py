"""How often something may happen."""

import time


class Allowance:
    """So many a second, and a few at once."""

    def __init__(self, most: float) -> None:
        self._most = self._left = most
        self._at = time.monotonic()

    def take(self, rate: float) -> bool:
        """Whether one more is allowed at this rate, 1/s."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * rate)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
