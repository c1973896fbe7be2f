"""Where verdicts wait while the journal's disk is full: a file whose blocks were taken when it was made.

It is overwritten in place from its beginning, which works where no file can grow. What stands in it survives the
death of the agent, and goes into the journal when that can be written again.
"""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import msgpack

from flawline.agent.wire import Header
from flawline.config.errors import JournalError

_HEAD = struct.Struct("<4sII")  # magic, length and CRC-32 of the body
_MAGIC = b"spil"
SIZE = 8 << 20
"""Bytes: about ten thousand verdicts with few defects."""

Unwritten = tuple[Header, int | None]
"""A verdict, and the row of the trigger that it answers."""


class Spill:
    """Not thread-safe; used from the journal's thread."""

    def __init__(self, path: Path, *, synced: bool = False) -> None:
        """With `synced` what was added survives the power."""
        self._path = path
        self._synced = synced
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            there = os.fstat(self._fd).st_size
            if there < SIZE:
                os.pwrite(self._fd, bytes(SIZE - there), there)
        except OSError as error:
            raise JournalError(f"{path}: cannot be made: {error.strerror or error}") from error
        self._end = 0

    def read(self) -> list[Unwritten]:
        """What an earlier agent left, in the order it was written; new records go behind it."""
        data = os.pread(self._fd, SIZE, 0)
        found: list[Unwritten] = []
        self._end = 0
        while self._end + _HEAD.size <= len(data):
            magic, length, crc = _HEAD.unpack_from(data, self._end)
            start = self._end + _HEAD.size
            body = data[start : start + length]
            if magic != _MAGIC or len(body) != length or zlib.crc32(body) != crc:
                break
            header, row = msgpack.unpackb(body)
            found.append((header, row))
            self._end = start + length
        return found

    def add(self, verdicts: list[Unwritten]) -> bool:
        """Keep these too; False where they do not fit or the disk refuses even this."""
        records = bytearray()
        for verdict in verdicts:
            body: bytes = msgpack.packb(verdict)
            records += _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body
        if self._end + len(records) + _HEAD.size > SIZE:
            return False
        data = bytes(records) + bytes(_HEAD.size)
        try:
            if os.pwrite(self._fd, data, self._end) < len(data):
                return False
            if self._synced:
                os.fdatasync(self._fd)
        except OSError:
            return False
        self._end += len(records)
        return True

    def replace(self, verdicts: list[Unwritten]) -> None:
        """Keep these in place of what was read: as many, and none longer."""
        self._end = 0
        self.add(verdicts)

    def clear(self) -> None:
        """All of it is in the journal."""
        if self._end:
            with contextlib.suppress(OSError):  # what stays there is known by its numbers when it is read again
                os.pwrite(self._fd, bytes(_HEAD.size), 0)
                self._end = 0

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
