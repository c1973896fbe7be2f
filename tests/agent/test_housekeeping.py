"""Housekeeping on a full disk: it makes room before it asks for some."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from test_times import Way
from test_worker_client import until

from flawline.agent import housekeeping
from flawline.agent.housekeeping import keep_house
from flawline.config.errors import JournalError
from flawline.config.settings import JournalSettings


async def test_the_log_is_carried_over_before_old_verdicts_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes nothing until the write-ahead log was carried over into the database."""
    monkeypatch.setattr(housekeeping, "_CHECKPOINT_EVERY_S", 0.01)
    way = Way(tmp_path)
    journal = way.journal
    headers: list[dict[str, Any]] = [{"camera": "top", "t_publish": 1, "result": "pass"} for _ in range(10)]
    for header in headers:
        journal.number(header)
    journal.commit([(header, None) for header in headers])
    checkpoint, drop_old, carried = journal.checkpoint, journal.drop_old, asyncio.Event()

    def carry() -> None:
        checkpoint()
        carried.set()

    def drop(*limits: Any) -> int:
        if not carried.is_set():
            raise JournalError("database or disk is full")
        return drop_old(*limits)

    monkeypatch.setattr(journal, "checkpoint", carry)
    monkeypatch.setattr(journal, "drop_old", drop)
    keeping = asyncio.create_task(keep_house(way.outbox, JournalSettings(keep_days=1)))
    await until(lambda: len(journal.replay(1, None, 99)[0]) == 1, 10)  # the newest is always kept
    keeping.cancel()
    await asyncio.wait([keeping])
    await way.close()
