"""A camera's own clock mapped to the host's monotonic one, and its frame numbers watched for gaps."""

_WINDOW_NS = 10_000_000_000
_LARGEST_GAP = 1000
_SIXTEEN_BITS = 65535
NO_NUMBER = 2**64 - 1  # what a driver says of a frame whose number it does not know


class DeviceClock:
    """Maps a free-running device clock to the host's monotonic one by the quickest of the latest frames.

    A frame arrives later than it was exposed, by the time of its transfer; no frame arrives earlier. So the
    smallest difference (arrival - device time) of the last 10 to 20 s is the offset of the clocks plus the
    shortest transfer; the window lets it follow the clocks' drift. Not to UTC: that is set while the line runs, and
    an exposure would seem to lie before what was announced ahead of it.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self._window_end = 0
        self._smallest: int | None = None
        self._before: int | None = None

    def to_monotonic(self, device_ns: int, arrived_ns: int) -> int:
        """When an exposure was made that the camera stamped `device_ns`, monotonic ns, never after `arrived_ns`."""
        if self._last is None or device_ns < self._last:  # the camera was restarted: another clock
            self._window_end = device_ns + _WINDOW_NS
            self._smallest = self._before = None
        elif device_ns > self._window_end:
            self._before = self._smallest if device_ns <= self._window_end + _WINDOW_NS else None
            self._smallest = None
            self._window_end = device_ns + _WINDOW_NS
        self._last = device_ns
        delay = arrived_ns - device_ns
        self._smallest = delay if self._smallest is None else min(self._smallest, delay)
        return device_ns + (self._smallest if self._before is None else min(self._smallest, self._before))


class BlockNumbers:
    """The numbers a camera gives its frames: which are missing between two that came.

    GigE Vision 1 counts 1 to 65535 and starts again at 1, some cameras at 0; the others count in 64 bits.
    """

    def __init__(self) -> None:
        self.missed = 0
        self.renumbered = 0
        self.restart()

    def restart(self) -> None:
        """A new acquisition: the next number may be any."""
        self._last: int | None = None
        self._least = 1  # what 65535 is followed by
        self._unnumbered = 0  # frames since the last number

    def gap(self, number: int) -> list[int]:
        """The numbers between the last frame and this one. A jump by more than 1000 is a new count, not a loss.

        A frame that came without a number is one of those that are missing then: of them the last are taken off.
        """
        if number == NO_NUMBER:
            self._unnumbered += 1
            return []
        unnumbered, self._unnumbered = self._unnumbered, 0
        if number == 0:
            self._least = 0
        last, self._last = self._last, number
        if last is None or number == last:
            return []
        if number > last:
            size = number - last - 1
        elif last <= _SIXTEEN_BITS:
            size = _SIXTEEN_BITS - last + number - self._least
        else:
            size = _LARGEST_GAP + 1
        if size > _LARGEST_GAP:
            self.renumbered += 1
            return []
        size = max(0, size - unnumbered)
        self.missed += size
        numbers = [last + 1 + i for i in range(size)]
        count = _SIXTEEN_BITS + 1 - self._least
        return numbers if number > last else [n if n <= _SIXTEEN_BITS else n - count for n in numbers]

    def name(self, number: int) -> int:
        """The number, for a frame without one that which it should have had."""
        return number if number != NO_NUMBER else (self._last or 0) + self._unnumbered
