"""A damaged journal never keeps an agent from starting, however the last one ended, and no number comes twice."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flawline.agent import journal_schema
from flawline.agent.journal import Journal
from flawline.agent.recipes import RecipeBook
from flawline.config.errors import JournalError
from flawline.config.settings import Settings

PAGE = 4096
VERDICTS = 600
# Two commits, so that the second begins the write-ahead log anew, and what is damaged later does not lie in it too.
WRITE = """
import os, signal, sys; from pathlib import Path
from flawline.agent.journal import Journal; from flawline.agent.verdict import Trigger
journal = Journal(Path(sys.argv[1]))
def write(count):
    headers = [{"camera": "top", "t_publish": 1, "result": "pass", "padding": "x" * 900} for _ in range(count)]
    for header in headers:
        journal.number(header)
    accepted = [Trigger("top", f"T{n}", None, 5, "default", 1) for n in range(count)]
    journal.commit([(header, None) for header in headers], accepted)
    journal.checkpoint()
write(int(sys.argv[3]) - 1); write(1)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
journal.close()
"""


def write_journal(folder: Path, ended: str) -> Path:
    """A journal of some hundred pages, whose agent was stopped or killed."""
    done = subprocess.run([sys.executable, "-c", WRITE, str(folder), ended, str(VERDICTS)], timeout=120)
    assert done.returncode == (-signal.SIGKILL if ended == "killed" else 0)
    return folder / "journal.sqlite"


def damage(file: Path, where: str) -> None:
    data = bytearray(file.read_bytes())
    pages = len(data) // PAGE
    assert pages > 100
    first, last = {"header": (0, 1), "tail": (pages - 40, pages), "middle": (2, pages)}[where]
    data[first * PAGE : last * PAGE] = b"\xa5" * ((last - first) * PAGE)
    file.write_bytes(data)


def commit(journal: Journal) -> int:
    header = {"camera": "top", "t_publish": 2, "result": "fail", "journalled": True}
    journal.number(header)
    journal.commit([(header, None)])
    return int(header["seq"])


@pytest.mark.parametrize("ended", ["stopped", "killed"])
@pytest.mark.parametrize("where", ["header", "tail", "middle"])
def test_damage_is_set_aside_and_the_agent_starts(tmp_path: Path, where: str, ended: str) -> None:
    file = write_journal(tmp_path, ended)
    damage(file, where)
    journal = Journal(tmp_path)
    recipes = RecipeBook(Settings(), journal)
    assert journal.set_aside is not None
    assert b"\xa5" * PAGE in journal.set_aside.read_bytes()
    assert journal.seq_jump is not None
    assert journal.unanswered() == []
    first = commit(journal)
    assert first == journal.seq_jump[1] > VERDICTS
    assert [header["seq"] for header in journal.replay(1, None, 10)[0]] == [first]
    assert recipes.for_worker()
    journal.close()
    again = Journal(tmp_path)
    assert (again.set_aside, again.seq_jump, commit(again)) == (None, None, first + 1)
    again.close()


@pytest.mark.parametrize("noticed_by", ["commit", "replay", "query"])
def test_damage_noticed_while_running_is_looked_into_at_the_next_start(tmp_path: Path, noticed_by: str) -> None:
    """A start after a stop in order does not look everywhere: here not at late results, nor at operators' words."""
    journal = Journal(tmp_path)
    for _ in range(3):
        commit(journal)
    journal.checkpoint()
    table = "feedback" if noticed_by == "query" else "late"
    root = journal.query("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,))[0][0]
    journal.close()
    file = tmp_path / "journal.sqlite"
    data = bytearray(file.read_bytes())
    data[(root - 1) * PAGE : root * PAGE] = b"\xa5" * PAGE
    file.write_bytes(data)
    journal = Journal(tmp_path)
    assert journal.set_aside is None
    notice = {
        "commit": lambda: journal.commit([], late=[{"seq": 2, "camera": "top"}]),
        "replay": lambda: journal.replay(1, None, 10),
        "query": lambda: journal.query("SELECT note FROM feedback"),
    }
    with pytest.raises(JournalError, match="damaged"):
        notice[noticed_by]()
    used = journal.last_seq
    journal.close()
    again = Journal(tmp_path)
    assert again.set_aside is not None
    assert commit(again) > used
    again.close()


def test_published_verdicts_of_a_damaged_journal_come_back_from_the_spill(tmp_path: Path) -> None:
    """What no journal took was published `journalled: false` and lies in the spill: the new journal takes it."""
    file = write_journal(tmp_path, "stopped")
    journal = Journal(tmp_path)
    journal._database.execute("PRAGMA query_only=1")  # every commit is refused from here on
    header = {"camera": "top", "t_publish": 2, "result": "fail"}
    journal.number(header)
    with pytest.raises(JournalError):
        journal.commit([(header, None)])
    for database in (journal._keeper, journal._reader, journal._database):
        database.close()
    os.close(journal._lock)  # as a process that ends without a word
    damage(file, "middle")
    again = Journal(tmp_path)
    assert again.set_aside is not None
    assert [kept["seq"] for kept in again.replay(1, None, 10)[0]] == [header["seq"]] == [VERDICTS + 1]
    commit(again)
    assert again.unwritten == 0
    again.close()


def test_a_jump_holds_though_its_agent_ends_before_the_first_verdict(tmp_path: Path) -> None:
    damage(write_journal(tmp_path, "killed"), "tail")
    first = Journal(tmp_path)
    assert first.seq_jump is not None
    for database in (first._keeper, first._reader, first._database):
        database.close()
    os.close(first._lock)  # as a process that ends without a word
    again = Journal(tmp_path)
    assert commit(again) == first.seq_jump[1]
    assert again.camera_seqs["top"] > VERDICTS
    again.close()


def test_the_schema_knows_damage_from_a_full_disk() -> None:
    undecodable = sqlite3.connect(":memory:")
    with pytest.raises(sqlite3.Error) as text:
        undecodable.execute("SELECT CAST(x'ff' AS TEXT)").fetchone()
    assert journal_schema.is_damage(text.value)
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    assert not journal_schema.is_damage(full)
