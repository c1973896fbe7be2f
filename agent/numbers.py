"""The reserved high-water mark of sequence numbers: what keeps a number from being used twice.

A small file beside the journal, of fixed size, filled when it is made and overwritten in place, so that it can be
written on a full disk. It holds up to which number verdicts may have gone out (`reserved`), the largest number that
went out without being journalled (`floor`) with every camera's own count at that time, whether the last agent ended
in order, and under which boot of the machine it ran.
"""

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgpack

from flawline.config.errors import JournalError

_HEAD = struct.Struct("<8sII")  # magic, length and CRC-32 of the body
_MAGIC = b"flawseq2"
_COPY = 65536  # bytes; room for some hundred cameras
_RESTORED = "restored"  # in place of the machine's boot
BLOCK = 1000
"""Numbers reserved at a time: one synchronous write for so many verdicts."""


@dataclass(frozen=True)
class Mark:
    """What the file says."""

    turn: int = 0
    reserved: int = 0
    floor: int = 0
    cameras: dict[str, int] = field(default_factory=dict)  # each camera's own count when `floor` was written
    camera_start: int = 0  # above this begins a camera that is not among them: set by the last jump
    machine_boot: str = ""
    clean: bool = False


def machine_boot() -> str:
    """Changes when the machine is started anew: then what was not synchronised to the disk may be lost."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class NumberMark:
    """Reserves numbers ahead of their use. Not thread-safe; used from the journal's thread.

    `opener` takes flags and mode and returns a descriptor, for who may not open the path by its name.
    """

    def __init__(self, path: Path, opener: Callable[[int, int], int] | None = None) -> None:
        self._path = path
        flags, mode = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640
        try:
            self._fd = opener(flags, mode) if opener is not None else os.open(path, flags, mode)
            data = os.pread(self._fd, 2 * _COPY, 0)
            if len(data) < 2 * _COPY:
                os.pwrite(self._fd, bytes(2 * _COPY - len(data)), len(data))
        except OSError as error:
            raise JournalError(f"{path}: cannot be opened: {error.strerror or error}") from error
        self._mark = max((_read(data[:_COPY]), _read(data[_COPY:])), key=lambda mark: mark.turn)
        self.power_lost = not self._mark.clean and self._mark.machine_boot not in ("", machine_boot())
        """The last agent did not end in order and the machine has been started since."""
        self.restored = self._mark.machine_boot == _RESTORED
        self.was_clean = self._mark.clean
        self.cameras = dict(self._mark.cameras)
        self._write(replace(self._mark, machine_boot=machine_boot(), clean=False))

    @property
    def reserved(self) -> int:
        """Up to this number verdicts may have gone out."""
        return self._mark.reserved

    @property
    def floor(self) -> int:
        """Up to this number they have, whether the journal holds them or not."""
        return self._mark.floor

    @property
    def camera_start(self) -> int:
        """A camera whose own count is not known goes on above this."""
        return self._mark.camera_start

    def reserve(self, seq: int) -> None:
        """Make sure that `seq` is covered by the mark on disk before it is used."""
        if seq > self._mark.reserved:
            self._write(replace(self._mark, reserved=seq + BLOCK))

    def used(self, seq: int, cameras: dict[str, int], *, clean: bool = False) -> None:
        """Verdicts up to `seq` are out, whatever the journal holds: the next start must go on above it."""
        if seq > self._mark.floor or clean:
            reserved = max(self._mark.reserved, seq)
            floor = max(self._mark.floor, seq)
            self._write(replace(self._mark, reserved=reserved, floor=floor, cameras=dict(cameras), clean=clean))

    def jumped(self, seq: int, cameras: dict[str, int]) -> None:
        """Numbers go on above `seq`, the cameras' own too: also after an agent that ends before its first verdict."""
        self._write(
            replace(
                self._mark,
                reserved=max(self._mark.reserved, seq),
                floor=max(self._mark.floor, seq),
                cameras=dict(cameras),
                camera_start=max(self._mark.camera_start, seq),
            )
        )

    def jump(self, seq: int) -> None:
        """A backup was restored here: numbers up to `seq` may be out. The next start announces the jump."""
        self._write(replace(self._mark, reserved=seq, floor=seq, machine_boot=_RESTORED, clean=False))

    def _write(self, mark: Mark) -> None:
        """Two copies are written in turn, so that a torn write leaves the other one whole."""
        mark = replace(mark, turn=self._mark.turn + 1)
        body: bytes = msgpack.packb(mark.__dict__)
        record = _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body
        if len(record) > _COPY:
            raise JournalError(f"{self._path}: too many cameras for {_COPY} bytes")
        try:
            os.pwrite(self._fd, record, (mark.turn % 2) * _COPY)
            os.fdatasync(self._fd)
        except OSError as error:
            raise JournalError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        self._mark = mark

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fd

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _read(data: bytes) -> Mark:
    if len(data) >= _HEAD.size:
        magic, length, crc = _HEAD.unpack_from(data)
        body = data[_HEAD.size : _HEAD.size + length]
        if magic == _MAGIC and len(body) == length and zlib.crc32(body) == crc:
            return Mark(**msgpack.unpackb(body))
    return Mark()
