"""What a PLC programmer relies on: numbers without gaps or repeats over restarts, crashes and damage."""

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from flawline.agent import journal as journal_module
from flawline.agent import numbers
from flawline.agent.journal import Journal
from flawline.agent.verdict import Trigger
from flawline.agent.wire import pack
from flawline.config.errors import ConfigError, JournalError


def verdict(journal: Journal, camera: str = "top", padding: int = 0) -> dict[str, Any]:
    header: dict[str, Any] = {"camera": camera, "t_publish": 1, "result": "pass", "padding": "x" * padding}
    header["journalled"] = True
    journal.number(header)
    return header


@contextlib.contextmanager
def full_disk(size: int = 200_000) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)


def test_numbers_go_on_without_gap_over_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    sent = [verdict(journal), verdict(journal, "side"), verdict(journal)]
    journal.commit([(header, None) for header in sent], late=[sent[1]])
    journal.close()
    again = Journal(tmp_path)
    assert again.seq_jump is None
    following = verdict(again)
    assert (following["seq"], following["camera_seq"]) == (4, 3)
    assert again.replay(1, None, 100) == (sent, [sent[1]], 4, True, [])
    assert again.replay(1, None, 1) == (sent[:1], [], 2, False, [])
    again.close()


def test_a_page_of_a_replay_is_no_larger_than_can_be_sent_between_two_verdicts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    sent = [verdict(journal) | {"detail": "x" * 100_000} for _ in range(25)]
    sent.append(verdict(journal) | {"detail": "x" * 1_040_000})
    journal.commit([(header, None) for header in sent])
    pages, start, complete = [], 1, False
    while not complete:
        headers, _, start, complete, _ = journal.replay(start, None, 500)
        pages.append(len(headers))
        assert headers == sent[start - 1 - len(headers) : start - 1]
    assert pages == [10, 10, 5, 1]
    journal.close()


def test_a_folder_that_cannot_be_looked_into_does_not_end_the_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal._ballast = tmp_path / ("x" * 300)  # the system refuses even to look
    journal.lay_ballast()
    journal.close()


def test_a_committed_verdict_survives_kill_9_and_an_open_trigger_too(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from flawline.agent.journal import Journal\n"
        "from flawline.agent.verdict import Trigger\n"
        "j = Journal(Path(sys.argv[1])); t = [Trigger('top', f'T{n}', 'P1', 5, 'default', 1) for n in range(3)]\n"
        "h = {'camera': 'top', 't_publish': 1, 'result': 'pass'}; j.number(h)\n"
        "j.commit([(h, t[0])], t[:2]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    journal = Journal(tmp_path)
    assert (journal.last_seq, journal.seq_jump) == (1, None)
    (owed,) = journal.unanswered()
    assert (owed.camera, owed.trigger_id, owed.part_id, owed.t_trigger) == ("top", "T1", "P1", 5)
    journal.commit([(verdict(journal), owed)])
    assert journal.unanswered() == []
    journal.close()


@pytest.mark.parametrize("damage", ["garbage", "gone", "empty"])
def test_a_lost_journal_never_repeats_a_number(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path)
    used = [verdict(journal) for _ in range(7)]
    journal.commit([(header, None) for header in used])
    journal.close()
    file = tmp_path / "journal.sqlite"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"not a database " * 1000 if damage == "garbage" else b"")
    again = Journal(tmp_path)
    assert (again.set_aside is not None) == (damage == "garbage")
    assert again.seq_jump is not None
    following = verdict(again)
    assert following["seq"] == again.seq_jump[1] > 7
    assert following["camera_seq"] > 7
    again.close()


def test_power_loss_jumps_over_what_may_have_been_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.commit([(verdict(journal), None)])
    monkeypatch.setattr(numbers, "machine_boot", lambda: "after the power came back")
    journal._mark.close()  # as a process that ends without a word
    journal._database.close()
    os.close(journal._lock)
    again = Journal(tmp_path)
    assert again.seq_jump == (1, 1 + numbers.BLOCK + 1)
    again.close()


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_the_full_disk_refuses_survives_the_power_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Literal["process", "power"]
) -> None:
    """Else its numbers, which are out, would be given again."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    journal = Journal(tmp_path, durability)
    synced.clear()
    with full_disk(), pytest.raises(JournalError):
        journal.commit([(verdict(journal, padding=150_000), None)])
    assert synced.count(str(tmp_path / "spill")) == (durability == "power")
    journal.close()


def test_a_full_disk_is_said_and_its_verdicts_are_kept_over_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit([(verdict(journal), None)])
    answered = Trigger("top", "T1", None, 5, "default", 1)
    journal.commit([], [answered])
    with full_disk():
        unwritten = verdict(journal, padding=150_000)
        refused, late = Trigger("top", "T2", None, 6, "default", 1), {"seq": 1, "journalled": True}
        with pytest.raises(JournalError, match=r"journal\.sqlite"):
            journal.commit([(unwritten, answered), (verdict(journal, "side"), None)], [refused], [late])
        assert refused.row is None
        assert unwritten["journalled"] is False
        assert late["journalled"] is False
        assert journal.unanswered() == []
    assert [header["seq"] for header in journal.replay(1, None, 9)[0]] == [1, 2, 3]
    journal.close()
    again = Journal(tmp_path)
    assert again.seq_jump is None
    assert again.unanswered() == []
    assert [header["seq"] for header in again.replay(1, None, 9)[0]] == [1, 2, 3]
    following = verdict(again)
    assert (following["seq"], following["camera_seq"]) == (4, 3)
    again.commit([(following, None)])
    assert again.unwritten == 0
    again.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database:
        assert database.execute("SELECT group_concat(seq) FROM verdicts").fetchone() == ("1,2,3,4",)
        assert database.execute("SELECT count(*) FROM triggers").fetchone() == (0,)


def test_verdicts_that_no_file_can_hold_do_not_repeat_their_numbers(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit([(verdict(journal), None)])
    with full_disk():
        unwritten = [verdict(journal, padding=5 << 20), verdict(journal, padding=5 << 20)]
        with pytest.raises(JournalError):
            journal.commit([(header, None) for header in unwritten])
    journal.close()
    again = Journal(tmp_path)
    assert (verdict(again)["seq"], again.seq_jump) == (4, None)
    again.close()


def test_two_agents_cannot_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(ConfigError, match="another running agent"):
        Journal(tmp_path)
    journal.close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(ConfigError, match="newer flawline"):
        Journal(tmp_path)
    assert not list(tmp_path.glob("*corrupt*"))


def test_a_journal_keeps_to_its_size(tmp_path: Path) -> None:
    """The oldest verdicts go, the newest stay, and the file stops growing although verdicts go on."""
    journal = Journal(tmp_path)
    sizes = []
    for _ in range(12):
        for _ in range(10):
            headers = [verdict(journal) | {"detail": "x" * 400} for _ in range(50)]
            journal.commit([(header, None) for header in headers])
        while journal.drop_old(keep_days=1e9, keep_verdicts=10**9, keep_mb=1.0):
            pass
        journal.checkpoint()
        sizes.append((tmp_path / "journal.sqlite").stat().st_size)
    kept = [header["seq"] for header in journal.replay(1, None, 10_000)[0]]
    journal.close()
    assert kept == list(range(kept[0], 6001)), "a gap, or the newest are gone"
    assert 500 < len(kept) < 2500
    assert max(sizes) < 1.6e6
    assert sizes[-1] <= sizes[6] * 1.02, sizes


def test_numbers_that_were_jumped_over_are_no_verdicts_to_forget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored backup goes on far above its numbers; what it brought back is not old for that."""
    monkeypatch.setattr(journal_module, "_STRIDE", 10)
    journal = Journal(tmp_path)
    headers = [verdict(journal) for _ in range(100)]
    journal.commit([(header, None) for header in headers])
    journal.feedback(50, "good", "anna", "")
    journal._mark.jump(5_000_000)
    journal.close()
    again = Journal(tmp_path)
    assert again.last_seq > 4_000_000
    keep = {"keep_days": 1e6, "keep_mb": 1e9}
    assert again.drop_old(keep_verdicts=120, **keep) == 0
    headers = [verdict(again) for _ in range(30)]
    again.commit([(header, None) for header in headers])
    while again.drop_old(keep_verdicts=120, **keep):
        pass
    left = [header["seq"] for header in again.replay(1, None, 999)[0]]
    assert left[-30:] == [header["seq"] for header in headers]
    assert 110 <= len(left) <= 120  # less than a stride of each gap may be taken for verdicts
    again.close()


def test_a_clock_that_is_wrong_for_a_while_does_not_wipe_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day, limits = 86_400.0, {"keep_verdicts": 1000, "keep_mb": 100.0}
    at = SimpleNamespace(utc=1_800_000_000.0, mono=1000.0)

    def passes(seconds: float) -> None:
        at.utc, at.mono = at.utc + seconds, at.mono + seconds

    clock = SimpleNamespace(time_ns=lambda: int(at.utc * 1e9), monotonic=lambda: at.mono)
    monkeypatch.setattr("flawline.agent.journal.time", clock)
    journal = Journal(tmp_path)
    for _ in range(10):  # one a day
        header = verdict(journal)
        header["t_publish"] = clock.time_ns()
        journal.commit([(header, None)])
        passes(day)
    assert journal.drop_old(keep_days=7.5, **limits) == 0, "none yet: the clock has not been watched for a moment"
    at.utc -= 1_700_000_000  # in the seventies, as a machine starts whose battery is empty
    assert journal.drop_old(keep_days=7.5, **limits) == 0
    at.utc += 1_700_000_000
    passes(60)
    at.utc += 100 * day  # for an hour
    assert journal.drop_old(keep_days=7.5, **limits) == 1
    passes(3600)
    assert journal.drop_old(keep_days=7.5, **limits) == 4
    at.utc -= 100 * day
    for _ in range(3):
        passes(60)
        assert journal.drop_old(keep_days=7.5, **limits) == 0
    passes(5 * day)
    assert journal.drop_old(keep_days=7.5, **limits) == 3
    assert [header["seq"] for header in journal.replay(1, None, 10).verdicts] == [9, 10]
    journal.close()


def test_feedback_needs_its_verdict_and_old_verdicts_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit([(verdict(journal, "side"), None)])
    journal.commit([(verdict(journal), None) for _ in range(5)])
    journal.feedback(2, "good", "anna", "only dust")
    said = journal.replay(1, None, 10).feedback
    assert [(word["seq"], word["label"], word["who"], word["note"]) for word in said] == [
        (2, "good", "anna", "only dust")
    ]
    assert journal.replay(1, None, 1).feedback == []
    with pytest.raises(JournalError, match="no verdict 99"):
        journal.feedback(99, "good", "anna", "")
    assert journal.drop_old(keep_days=1, keep_verdicts=1000, keep_mb=100) == 0, "by age they go bit by bit"
    assert journal.drop_old(keep_days=1e6, keep_verdicts=1, keep_mb=100) == 5
    assert [header["seq"] for header in journal.replay(1, None, 10)[0]] == [6]
    journal.checkpoint()
    journal.close()
    again = Journal(tmp_path)
    assert verdict(again, "side")["camera_seq"] == 2  # though no verdict of that camera is left
    again.close()


def test_remarks_on_a_verdict_are_few_and_belong_to_the_size_of_a_page(tmp_path: Path) -> None:
    """One verdict's never make a reply that no client takes, also those of a journal that took any number."""
    journal = Journal(tmp_path)
    sent = [verdict(journal) for _ in range(40)]
    journal.commit([(header, None) for header in sent], late=[sent[0] | {"detail": "x" * 500_000}])
    for seq in range(1, 41):
        for number in range(20):
            journal.feedback(seq, "bad", "anna", f"{number} " + "\U0001f600" * 2000)
    with pytest.raises(JournalError, match="verdict 7 has 20 remarks already"):
        journal.feedback(7, "good", "anna", "")
    start, complete, sizes, words = 1, False, [], []
    while not complete:
        page = journal.replay(start, None, 500)
        start, complete = page.next_seq, page.done
        sizes.append(len(pack(page._asdict())))
        words += page.feedback
    assert max(sizes) < 1.1e6
    assert [word["seq"] for word in words] == [seq for seq in range(1, 41) for _ in range(20)]
    journal.query("UPDATE feedback SET seq = 5")
    page = journal.replay(5, 5, 500)
    assert [word["note"].split()[0] for word in page.feedback] == [str(number) for number in range(20)]
    assert len(pack(page._asdict())) < 200_000
    journal.close()


def test_remarks_make_no_verdict_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_REMARKS_BYTES", 2e6)
    journal = Journal(tmp_path)
    headers = [verdict(journal) | {"detail": "x" * 300} for _ in range(1000)]
    journal.commit([(header, None) for header in headers])

    def left() -> int:
        while journal.drop_old(keep_days=1e9, keep_verdicts=10**9, keep_mb=1.0):
            pass
        return int(journal.query("SELECT count(*) FROM verdicts")[0][0])

    kept = left()
    assert kept == 1000
    note = "\U0001f600" * 900

    def say_much() -> None:
        for number in range(1000):
            journal.feedback(1000 - number // 20, "bad", "anna", note)

    with pytest.raises(JournalError, match="2 MB of feedback already"):
        say_much()
    assert journal._held_bytes() > 1.9e6, "so they are counted as what they are"
    assert left() == kept
    journal.close()
    journal = Journal(tmp_path)
    assert left() == kept, "nor after a restart"
    assert journal.drop_old(keep_days=1e9, keep_verdicts=990, keep_mb=1.0) == 10
    while journal.drop_old(keep_days=1e9, keep_verdicts=1, keep_mb=1.0):
        pass
    assert journal._remarks_bytes < 200_000, "what was forgotten is room again"
    journal.close()
