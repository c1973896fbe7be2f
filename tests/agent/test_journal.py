"""What a PLC programmer relies on: numbers without gaps or repeats over restarts, crashes and damage."""

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flawline.agent.journal import Journal
from flawline.config.errors import ConfigError, JournalError


def verdict(journal: Journal, camera: str = "top", padding: int = 0) -> dict[str, Any]:
    header: dict[str, Any] = {"camera": camera, "t_publish": 1, "result": "pass", "padding": "x" * padding}
    journal.number(header)
    return header


def test_numbers_go_on_without_gap_over_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    sent = [verdict(journal), verdict(journal, "side"), verdict(journal)]
    journal.append([(header, None) for header in sent])
    journal.close()
    again = Journal(tmp_path)
    assert again.seq_jump is None
    following = verdict(again)
    assert (following["seq"], following["camera_seq"]) == (4, 3)
    assert again.replay(1, None, 100) == (sent, 4, True)
    assert again.replay(1, None, 2) == (sent[:2], 3, False)
    again.close()


def test_a_committed_verdict_survives_kill_9(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from flawline.agent.journal import Journal\n"
        "j = Journal(Path(sys.argv[1])); j.accept('top', 'T1', 'P1', 5, 'default', 1)\n"
        "h = {'camera': 'top', 't_publish': 1, 'result': 'pass'}; j.number(h); j.append([(h, None)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    journal = Journal(tmp_path)
    assert journal.last_seq == 1
    (owed,) = journal.unanswered()
    assert (owed.camera, owed.trigger_id, owed.part_id, owed.t_trigger) == ("top", "T1", "P1", 5)
    journal.append([(verdict(journal), owed.row)])
    assert journal.unanswered() == []
    journal.close()


@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_a_lost_journal_never_repeats_a_number(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path)
    used = [verdict(journal) for _ in range(7)]
    journal.append([(header, None) for header in used])
    journal.close()
    file = tmp_path / "journal.sqlite"
    if damage == "garbage":
        file.write_bytes(b"not a database " * 1000)
    else:
        file.unlink()
    again = Journal(tmp_path)
    assert (again.set_aside is not None) == (damage == "garbage")
    assert again.seq_jump is not None
    following = verdict(again)
    assert following["seq"] == again.seq_jump[1] > 7
    assert following["camera_seq"] > 7
    again.close()


def test_a_full_disk_is_said_and_its_numbers_are_not_used_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([(verdict(journal), None)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        unwritten = verdict(journal, padding=400_000)
        with pytest.raises(JournalError, match=r"journal\.sqlite"):
            journal.append([(unwritten, None)])
        journal.used_without_journal(unwritten["seq"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    journal.close()
    again = Journal(tmp_path)
    assert verdict(again)["seq"] == unwritten["seq"] + 1
    again.close()


def test_two_agents_cannot_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(ConfigError, match="another running agent"):
        Journal(tmp_path)
    journal.close()


def test_feedback_needs_its_verdict_and_old_verdicts_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([(verdict(journal), None) for _ in range(5)])
    journal.feedback(2, "good", "anna", "only dust")
    with pytest.raises(JournalError, match="no verdict 99"):
        journal.feedback(99, "good", "anna", "")
    assert journal.drop_old(keep_days=1, keep_verdicts=1000) == 4  # t_publish is 1 ns after the epoch
    assert [header["seq"] for header in journal.replay(1, None, 10)[0]] == [5]
    journal.close()
