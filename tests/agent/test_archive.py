"""The archive of pictures: its budget over restarts, and that a full one costs no memory."""

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawline.agent.archive import OLDEST, Archive
from flawline.config.settings import JournalSettings

PICTURE = np.zeros((8, 8, 3), np.uint8)


def header(seq: int, camera: str = "top") -> dict[str, Any]:
    return {"seq": seq, "camera": camera, "result": "fail"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/*"))


def make(folder: Path, archive_mb: float) -> Archive:
    archive = Archive(folder, JournalSettings(path=folder, archive_mb=archive_mb, min_free_mb=0))
    archive.scan()
    return archive


def test_the_oldest_go_first_also_those_of_an_earlier_run_and_of_other_cameras(tmp_path: Path) -> None:
    first = make(tmp_path, 100)
    for seq in range(1, OLDEST + 101):
        first.keep(header(seq, "top" if seq % 2 else "side"), PICTURE)
    each = first.bytes // first.pictures
    room = 40  # pictures: far fewer than there are, so that more must go than are noted at once
    again = make(tmp_path, room * each / 1e6)
    assert (again.pictures, again.bytes) == (first.pictures, first.bytes)
    again.keep(header(1000), PICTURE)
    kept = names(tmp_path)
    assert kept == [f"{seq:012}-fail.jpg" for seq in [*range(OLDEST + 101 - room + 1, OLDEST + 101), 1000]]
    assert again.pictures == len(kept)
    assert again.bytes == sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= room * each


def test_what_somebody_has_taken_away_does_not_count_for_ever(tmp_path: Path) -> None:
    archive = make(tmp_path, 100)
    for seq in range(1, 11):
        archive.keep(header(seq), PICTURE)
    for path in tmp_path.glob("*/*"):
        path.unlink()
    archive = make(tmp_path, 100)
    assert (archive.pictures, archive.bytes, archive.trouble) == (0, 0, None)


def test_memory_does_not_grow_with_the_pictures_on_the_disk(tmp_path: Path) -> None:
    archive = make(tmp_path, 100)
    archive.keep(header(1), PICTURE)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for seq in range(2, 502):
            archive.keep(header(seq), PICTURE)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert archive.pictures == 501
    assert after - before < 40_000  # bytes; a name and a size for each would be more than 150 000


def test_what_is_not_ours_is_neither_counted_nor_taken_away_nor_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive may have a disk of its own, with a `lost+found` that root alone may read."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep/for the customer.jpg").write_bytes(bytes(5000))
    scandir = os.scandir

    def guarded(folder: Path) -> Iterator["os.DirEntry[str]"]:
        if Path(folder).name == "lost+found":  # root, who runs tests, may look everywhere
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("flawline.agent.archive.os.scandir", guarded)
    first = make(tmp_path, 100)
    assert (first.pictures, first.bytes, first.trouble) == (0, 0, None)
    first.keep(header(1), PICTURE)
    small = make(tmp_path, 1.5 * first.bytes / 1e6)
    for seq in range(2, 6):
        small.keep(header(seq), PICTURE)
    assert names(tmp_path) == ["000000000005-fail.jpg", "for the customer.jpg"]


def test_a_disk_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top").mkdir()

    def broken(folder: Path) -> Iterator["os.DirEntry[str]"]:
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setattr("flawline.agent.archive.os.scandir", broken)
    archive = make(tmp_path, 100)
    assert archive.trouble is not None
    assert "Input/output error" in archive.trouble
