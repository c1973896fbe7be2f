"""Pictures of failed parts, and a sample of good ones, beside the journal: under a budget, oldest first out."""

import contextlib
import heapq
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import structlog
from numpy.typing import NDArray

from flawline.agent.wire import Header
from flawline.config.settings import JournalSettings

log = structlog.get_logger()
_WAITING = 4
"""Pictures that may wait to be written; further ones are passed over, because each holds a slot of the ring."""
OLDEST = 256
"""Pictures whose names are kept in memory, the next to go: a full archive may hold a hundred thousand."""
_NAME = re.compile(r"(\d{12,})-(?:pass|fail)\.(?:jpg|png)")


def kept_pictures(folder: Path) -> dict[int, Path]:
    """The pictures of an archive by their verdicts' numbers, rising."""
    found = {int(match[1]): path for path in folder.glob("*/*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """What lies in the folders below."""
    for below in folder.glob("*/"):
        with contextlib.suppress(PermissionError, FileNotFoundError, NotADirectoryError):
            yield from os.scandir(below)


class Archive:
    """`wants` is asked on the event loop; `keep` and `scan` block, and run on the archive's own thread."""

    def __init__(self, folder: Path, settings: JournalSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._budget = int(settings.archive_mb * 1e6)
        self._floor = int(settings.min_free_mb * 1e6)
        self._oldest: deque[tuple[str, str, int]] = deque()  # name, path, bytes; the oldest first
        self._good = 0
        self.waiting = 0
        self.pictures = 0
        self.bytes = 0
        self.passed_over = 0
        self.trouble: str | None = None

    def scan(self) -> None:
        """Count what is there, that of earlier runs too, and note the oldest.

        Names begin with the verdict's number, so that sorting is by age. What has no such name is not ours, nor what
        cannot be read: a disk's `lost+found`.
        """
        pictures = total = 0

        def all_counted() -> Iterator[tuple[str, str, int]]:
            nonlocal pictures, total
            for entry in _entries(self._folder):
                if _NAME.fullmatch(entry.name) is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # somebody has just taken it away
                    size = entry.stat().st_size
                    pictures, total = pictures + 1, total + size
                    yield entry.name, entry.path, size

        try:
            self._oldest = deque(heapq.nsmallest(OLDEST, all_counted()))
        except OSError as error:  # of the disk itself: nothing is known of what is there
            self._say(f"{self._folder}: cannot be read: {error}")
            pictures = total = 0
        self.pictures, self.bytes = pictures, total

    def wants(self, header: Header) -> bool:
        """Whether this verdict's picture is to be kept; takes a place in the queue where it is."""
        if self._settings.archive == "never" or header["result"] == "error":
            return False
        if header["result"] == "pass":
            self._good += 1
            every = self._settings.archive_good_every
            if every == 0 or self._good % every:
                return False
        if self.waiting >= _WAITING:
            self.passed_over += 1
            return False
        self.waiting += 1
        return True

    def keep(self, header: Header, picture: NDArray[np.uint8]) -> None:
        """Write (H, W, 3) RGB as `CAMERA/SEQ-RESULT.jpg`, unless the disk is too full; old ones make room."""
        suffix = self._settings.archive_format
        file = self._folder / header["camera"] / f"{header['seq']:012}-{header['result']}.{suffix}"
        try:
            quality = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == "jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
            data = cv2.imencode(f".{suffix}", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
            file.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if free < self._floor + len(data):
                self._say(f"{self._folder}: {free / 1e6:.0f} MB free, less than journal.min_free_mb: nothing is kept")
                return
            self._make_room(len(data))
            if self.bytes + len(data) > self._budget:
                self._say(f"{self._folder}: journal.archive_mb is too small for one picture")
                return
            part = file.with_suffix(".part")
            part.write_bytes(data)
            os.replace(part, file)
        except (OSError, cv2.error) as error:
            self._say(f"{file}: cannot be written: {error}")
            return
        self.pictures += 1
        self.bytes += len(data)
        self._say(None)

    def _make_room(self, size: int) -> None:
        while self.pictures and self.bytes + size > self._budget:
            if not self._oldest:
                self.scan()
                continue
            _, path, there = self._oldest.popleft()
            Path(path).unlink(missing_ok=True)
            self.pictures -= 1
            self.bytes -= there

    def _say(self, trouble: str | None) -> None:
        """Once when it begins, once when it ends."""
        if trouble is not None and self.trouble is None:
            log.warning("archive_stops", reason=trouble)
        elif trouble is None and self.trouble is not None:
            log.info("archive_goes_on")
        self.trouble = trouble

    def status(self) -> Header:
        """For the status message."""
        return {
            "pictures": self.pictures,
            "bytes": self.bytes,
            "passed_over": self.passed_over,
            "trouble": self.trouble,
        }
