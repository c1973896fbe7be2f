"""Housekeeping on a full disk: it makes room before it asks for some."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flawline.agent import housekeeping
from flawline.agent.housekeeping import keep_house
from flawline.agent.journal import Journal
from flawline.config.errors import JournalError
from flawline.config.settings import JournalSettings


class Full(Journal):
    """Takes nothing until its write-ahead log was carried over."""

    carried = 0

    def checkpoint(self) -> None:
        self.carried += 1
        super().checkpoint()

    def drop_old(self, *limits: Any) -> int:
        if not self.carried:
            raise JournalError("database or disk is full")
        return super().drop_old(*limits)


async def test_the_log_is_carried_over_before_old_verdicts_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_CHECKPOINT_EVERY_S", 0.01)
    journal = Full(tmp_path)
    headers: list[dict[str, Any]] = [{"camera": "top", "t_publish": 1, "result": "pass"} for _ in range(10)]
    for header in headers:
        journal.number(header)
    journal.commit([(header, None) for header in headers])

    async def at_once(work: Any, *given: Any) -> Any:
        return work(*given)

    outbox = SimpleNamespace(
        journal=journal,
        journal_fails=False,
        archive=SimpleNamespace(scan=lambda: None),
        on_archive=at_once,
        on_journal=at_once,
    )
    keeping = asyncio.create_task(keep_house(outbox, JournalSettings(keep_days=1)))  # type: ignore[arg-type]
    for _ in range(500):
        if len(journal.replay(1, None, 99)[0]) == 1:
            break
        await asyncio.sleep(0.01)
    assert len(journal.replay(1, None, 99)[0]) == 1, "the newest is always kept"
    keeping.cancel()
    await asyncio.wait([keeping])
    journal.close()
