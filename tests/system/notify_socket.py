"""A notification socket of our own, in the place of systemd's."""

import socket
import time


class NotifySocket:
    """Receives as systemd does. `lines` holds (time, line) of all that came."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.lines: list[tuple[float, str]] = []

    def receive(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                return
            self.lines += [(time.monotonic(), line) for line in data.decode().split("\n")]

    def until(self, beginning: str, limit_s: float = 90.0) -> str:
        """The first new line that begins so."""
        end = time.monotonic() + limit_s
        seen = len(self.lines)
        while time.monotonic() < end:
            self.receive(0.2)
            for _, line in self.lines[seen:]:
                if line.startswith(beginning):
                    return line
        raise AssertionError((beginning, self.lines))

    def count(self, line: str, seconds: float) -> int:
        """How often a line comes from now on."""
        self.receive(0.01)
        seen = len(self.lines)
        self.receive(seconds)
        return [text for _, text in self.lines[seen:]].count(line)
