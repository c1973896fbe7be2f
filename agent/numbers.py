"""The reserved high-water mark of sequence numbers: what keeps a number from being used twice.

A small file beside the journal, of fixed size and overwritten in place, so that it can be written on a full
disk. It holds two numbers: `reserved`, up to which numbers may have been used, and `floor`, the largest number
that went out without being journalled.
"""

import os
import struct
import zlib
from pathlib import Path

from flawline.config.errors import JournalError

_FORMAT = struct.Struct("<8sQQ")
_MAGIC = b"flawseq1"
_SIZE = _FORMAT.size + 4
BLOCK = 1000
"""Numbers reserved at a time: one synchronous write for so many verdicts."""


class NumberMark:
    """Reserves numbers ahead of their use. Not thread-safe; used from the journal's thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            data = os.pread(self._fd, 2 * _SIZE, 0)
        except OSError as error:
            raise JournalError(f"{path}: cannot be opened: {error.strerror or error}") from error
        self.fresh = not data
        self.reserved, self.floor = self._newest(data)
        self._turn = 0

    def _newest(self, data: bytes) -> tuple[int, int]:
        """Two copies are written in turn, so that a torn write leaves the other one whole."""
        best = (0, 0)
        for start in (0, _SIZE):
            part = data[start : start + _SIZE]
            if len(part) == _SIZE and zlib.crc32(part[:-4]) == int.from_bytes(part[-4:], "little"):
                magic, reserved, floor = _FORMAT.unpack(part[:-4])
                if magic == _MAGIC:
                    best = max(best, (reserved, floor))
        return best

    def reserve(self, seq: int) -> None:
        """Make sure that `seq` is covered by the mark on disk before it is used."""
        if seq > self.reserved:
            self._write(seq + BLOCK, self.floor)

    def used_without_journal(self, seq: int) -> None:
        """`seq` goes out although the journal does not hold it: the next start must go on above it."""
        if seq > self.floor:
            self._write(max(self.reserved, seq), seq)

    def _write(self, reserved: int, floor: int) -> None:
        body = _FORMAT.pack(_MAGIC, reserved, floor)
        record = body + zlib.crc32(body).to_bytes(4, "little")
        try:
            os.pwrite(self._fd, record, self._turn * _SIZE)
            os.fdatasync(self._fd)
        except OSError as error:
            raise JournalError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        self._turn = 1 - self._turn
        self.reserved, self.floor = reserved, floor

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
