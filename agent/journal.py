"""The journal: every verdict, committed before it is published, and every trigger that is still owed one.

SQLite in WAL mode. What survives: the death of any process, always; loss of power, with `durability = "power"`
(each commit then waits for the disk). A journal that cannot be read is set aside, never deleted, and numbering goes
on above the reserved mark (numbers.py), so that no number is used twice.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawline.agent.numbers import NumberMark
from flawline.agent.wire import Header, pack, unpack
from flawline.config.errors import ConfigError, JournalError

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
  seq INTEGER PRIMARY KEY, camera TEXT NOT NULL, camera_seq INTEGER NOT NULL,
  t_publish INTEGER NOT NULL, result TEXT NOT NULL, header BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS verdicts_by_camera ON verdicts (camera, camera_seq);
CREATE TABLE IF NOT EXISTS triggers (
  id INTEGER PRIMARY KEY, camera TEXT NOT NULL, trigger_id TEXT, part_id TEXT,
  t_trigger INTEGER NOT NULL, recipe TEXT NOT NULL, recipe_version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS feedback (
  id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, label TEXT NOT NULL, who TEXT NOT NULL, note TEXT NOT NULL,
  t INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class OpenTrigger:
    """A trigger that was accepted before the agent died and is still owed a verdict."""

    row: int
    camera: str
    trigger_id: str | None
    part_id: str | None
    t_trigger: int
    recipe: str
    recipe_version: int


class Journal:
    """One station's journal. Every method blocks and is called from one thread, the journal's own."""

    def __init__(self, folder: Path, durability: Literal["process", "power"] = "process") -> None:
        self.folder = folder
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self.set_aside: Path | None = None
        self.seq_jump: tuple[int, int] | None = None
        self.last_seq = 0
        self.camera_seqs: dict[str, int] = {}
        self._lock = self._lock_folder()
        self._mark = NumberMark(folder / "seq.mark")
        self._database = self._open()
        self._take_up_numbers()

    def _lock_folder(self) -> int:
        """Only one agent may write here. The lock goes with the process, however it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ConfigError(f"journal.path: {self.folder} cannot be used: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(f"journal.path: {self.folder} is in use by another running agent") from error
        return lock

    def _open(self) -> sqlite3.Connection:
        file = self.folder / "journal.sqlite"
        try:
            return self._connect(file)
        except JournalError:
            if not file.exists():
                raise
        self.set_aside = file.with_name(f"journal.corrupt-{time.time_ns()}.sqlite")
        for suffix in ("", "-wal", "-shm"):
            part = Path(f"{file}{suffix}")
            if part.exists():
                part.rename(f"{self.set_aside}{suffix}")
        return self._connect(file)

    def _connect(self, file: Path) -> sqlite3.Connection:
        database: sqlite3.Connection | None = None
        try:
            database = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=1.0)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(f"PRAGMA synchronous={self._synchronous}")
            version = int(database.execute("PRAGMA user_version").fetchone()[0])
            if version > _SCHEMA_VERSION:
                raise ConfigError(f"{file}: was written by a newer flawline (schema {version})")
            if database.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise JournalError(f"{file}: is corrupt")
            database.executescript(_SCHEMA)
            database.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        except (sqlite3.Error, JournalError, ConfigError) as error:
            if database is not None:
                database.close()
            if isinstance(error, sqlite3.Error):
                raise JournalError(f"{file}: cannot be opened: {error}") from error
            raise
        return database

    def _take_up_numbers(self) -> None:
        last = int(self._database.execute("SELECT coalesce(max(seq), 0) FROM verdicts").fetchone()[0])
        rows = self._database.execute("SELECT camera, max(camera_seq) FROM verdicts GROUP BY camera")
        self.camera_seqs = {camera: int(number) for camera, number in rows}
        lost = self.set_aside is not None or (last == 0 and not self._mark.fresh)
        start = self._mark.reserved if lost else max(last, self._mark.floor)
        if start > last:
            # Every camera's own count is at most the station's, so the station's is safe for all of them.
            self.seq_jump = (last, start + 1)
            self.camera_seqs = dict.fromkeys(self.camera_seqs, start)
        self._camera_start = start if start > last else 0
        self.last_seq = start

    def number(self, header: Header) -> None:
        """Give a verdict its numbers: the station's and the camera's next."""
        self._mark.reserve(self.last_seq + 1)
        self.last_seq += 1
        camera = header["camera"]
        self.camera_seqs[camera] = self.camera_seqs.get(camera, self._camera_start) + 1
        header["seq"], header["camera_seq"] = self.last_seq, self.camera_seqs[camera]

    def append(self, verdicts: Iterable[tuple[Header, int | None]]) -> None:
        """Commit numbered verdicts, and settle the trigger (by its row) that each one answers.

        Raises JournalError where the disk refuses; the caller then says `journalled: false`.
        """
        rows = [
            ((h["seq"], h["camera"], h["camera_seq"], h["t_publish"], h["result"], pack(h)), trigger)
            for h, trigger in verdicts
        ]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", [row for row, _ in rows])
            self._database.executemany(
                "DELETE FROM triggers WHERE id = ?", [(trigger,) for _, trigger in rows if trigger is not None]
            )
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise JournalError(f"{self.folder / 'journal.sqlite'}: cannot be written: {error}") from error

    def used_without_journal(self, seq: int) -> None:
        """This verdict goes out without being journalled: the next start goes on above it."""
        self._mark.used_without_journal(seq)

    def accept(
        self, camera: str, trigger_id: str | None, part_id: str | None, t_trigger: int, recipe: str, version: int
    ) -> int:
        """Remember a trigger that is owed a verdict; returns its row. Raises JournalError."""
        try:
            cursor = self._database.execute(
                "INSERT INTO triggers (camera, trigger_id, part_id, t_trigger, recipe, recipe_version)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (camera, trigger_id, part_id, t_trigger, recipe, version),
            )
        except sqlite3.Error as error:
            self._roll_back()
            raise JournalError(f"{self.folder / 'journal.sqlite'}: cannot be written: {error}") from error
        return int(cursor.lastrowid or 0)

    def unanswered(self) -> list[OpenTrigger]:
        """Triggers accepted by an agent that died before it answered them, oldest first."""
        rows = self._database.execute(
            "SELECT id, camera, trigger_id, part_id, t_trigger, recipe, recipe_version FROM triggers ORDER BY id"
        )
        return [OpenTrigger(*row) for row in rows]

    def replay(self, from_seq: int, to_seq: int | None, limit: int) -> tuple[list[Header], int, bool]:
        """Journalled verdicts from a number on: the headers, the number to go on with, and whether that was all."""
        last = self.last_seq if to_seq is None else to_seq
        rows = self._database.execute(
            "SELECT header FROM verdicts WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?", (from_seq, last, limit + 1)
        ).fetchall()
        headers = [unpack(row[0]) for row in rows[:limit]]
        next_seq = headers[-1]["seq"] + 1 if headers else from_seq
        return headers, next_seq, len(rows) <= limit

    def feedback(self, seq: int, label: str, who: str, note: str) -> None:
        """Keep an operator's word on a verdict. Raises JournalError where there is no such verdict."""
        if self._database.execute("SELECT 1 FROM verdicts WHERE seq = ?", (seq,)).fetchone() is None:
            raise JournalError(f"there is no verdict {seq} in the journal")
        self._database.execute(
            "INSERT INTO feedback (seq, label, who, note, t) VALUES (?, ?, ?, ?, ?)",
            (seq, label, who, note, time.time_ns()),
        )

    def drop_old(self, keep_days: float, keep_verdicts: int) -> int:
        """Forget verdicts beyond the limits, the newest always kept; returns how many."""
        oldest = time.time_ns() - int(keep_days * 86_400e9)
        cursor = self._database.execute(
            "DELETE FROM verdicts WHERE seq < ? AND (t_publish < ? OR seq <= ?)",
            (self.last_seq, oldest, self.last_seq - keep_verdicts),
        )
        return cursor.rowcount

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def close(self) -> None:
        """Let go of the files and the lock."""
        self._database.close()
        self._mark.close()
        os.close(self._lock)
