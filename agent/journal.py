"""The journal: every verdict, committed before it is published, and every trigger that is still owed one.

SQLite in WAL mode. What survives: the death of any process, always; loss of power, with `durability = "power"`
(each commit then waits for the disk). On a full disk verdicts wait in the spill (spill.py), and go out with
`journalled: false`. A journal that cannot be read is set aside, never deleted, and numbering goes on above the
reserved mark (numbers.py), so that no number is used twice.
"""

import contextlib
import fcntl
import itertools
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import structlog

from flawline.agent.journal_schema import (
    CorruptJournal,
    as_journal_error,
    is_damage,
    prepare,
    read_all_that_a_start_needs,
)
from flawline.agent.numbers import NumberMark
from flawline.agent.spill import Spill, Unwritten
from flawline.agent.station_folder import BESIDE_JOURNAL, JOURNAL, LOCK, NUMBER_MARK
from flawline.agent.verdict import Trigger
from flawline.agent.wire import Header, pack, unpack
from flawline.config.errors import ConfigError, JournalError

log = structlog.get_logger()
_KEPT_UNWRITTEN = 20_000  # verdicts kept in memory while the journal cannot be written
_BALLAST = 1 << 20  # bytes
_PAGE_BYTES = 1 << 20  # of verdicts in one page of a replay: some 10 ms to pack
_USUAL_BYTES = 1000  # a verdict that is not journalled yet
_REMARKS = 20  # of operators on one verdict
_REMARKS_BYTES = 64e6  # of all verdicts together, beside what `keep_mb` is for
_STRIDE = 5000  # numbers
_FASTEST = 100  # times as fast as time passes does forgetting by age go on, at most
_STEP = 200  # rows in one step of catching up or forgetting, about a millisecond


_REMARK = "(length(CAST(label AS BLOB)) + length(CAST(who AS BLOB)) + length(CAST(note AS BLOB)))"
# What the database takes for one, about: long ones have pages of their own.
_REMARK_ROOM = f"(CASE WHEN {_REMARK} > 2000 THEN ({_REMARK} + 4095) / 4096 * 4096 ELSE {_REMARK} * 4 / 3 + 100 END)"


class Page(NamedTuple):
    """What `replay` finds."""

    verdicts: list[Header]
    late: list[Header]  # results that came after these verdicts' deadlines
    next_seq: int  # to go on with
    done: bool  # that was all
    feedback: list[Header]  # what operators said of these verdicts: seq, label, who, note, t


class Journal:
    """One station's journal. All is called from one thread, its own; but for `replay` (any) and `checkpoint` (one)."""

    def __init__(self, folder: Path, durability: Literal["process", "power"] = "process") -> None:
        self.folder = folder
        self.file = folder / JOURNAL
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self.set_aside: Path | None = None
        self.seq_jump: tuple[int, int] | None = None
        self.last_seq = 0
        self.camera_seqs: dict[str, int] = {}
        self._reading = threading.Lock()  # of `_unwritten` and of the reading connection
        self._unwritten: deque[Unwritten] = deque(maxlen=_KEPT_UNWRITTEN)
        self._lock = self._lock_folder()
        self._mark = NumberMark(folder / NUMBER_MARK)
        self._spill = Spill(folder / "spill", synced=durability == "power")
        self._ballast = folder / "ballast"
        self._found_version = 0
        self._gaps: list[tuple[int, int]] | None = None  # not looked for yet
        self._horizon: tuple[int, float] | None = None  # what is older may be forgotten (UTC ns), as of when
        self._damaged = False  # noticed while running: the next start looks into it
        self._database, self._reader, self._keeper = self._open(durability)
        self._remarks_bytes = self._room_of_remarks()
        self.lay_ballast()

    def _lock_folder(self) -> int:
        """Only one agent may write here. The lock goes with the process, however it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ConfigError(f"journal.path: {self.folder} cannot be used: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(f"journal.path: {self.folder} is in use by another running agent") from error
        return lock

    def _open(self, durability: str) -> tuple[sqlite3.Connection, ...]:
        """Three connections, and the numbers taken up; a damaged file is set aside and a new one begun."""
        try:
            return self._open_file(durability)
        except CorruptJournal as error:
            log.error("journal_corrupt", error=str(error))
        self.set_aside = self.file.with_name(f"journal.corrupt-{time.time_ns()}.sqlite")
        for suffix in ("", *BESIDE_JOURNAL):
            part = Path(f"{self.file}{suffix}")
            if part.exists():
                part.rename(f"{self.set_aside}{suffix}")
        return self._open_file(durability)

    def _open_file(self, durability: str) -> tuple[sqlite3.Connection, ...]:
        opened: list[sqlite3.Connection] = []
        try:
            opened.append(self._open_first())
            read_all_that_a_start_needs(opened[0], self.file)
            self._take_up_numbers(opened[0], durability)
            opened += [self._connect(self.file), self._connect(self.file)]
        except BaseException as error:
            for database in opened:
                database.close()
            if isinstance(error, sqlite3.Error):
                raise as_journal_error(error, f"{self.file}: cannot be opened") from error
            raise
        return tuple(opened)

    def _open_first(self) -> sqlite3.Connection:
        try:
            return self._connect(self.file, first=True)
        except CorruptJournal:
            raise
        except JournalError as error:
            if not self._ballast.exists():
                raise
            # Opening takes a little room. It was laid by for this: a line must start on a full disk too.
            log.error("journal_disk_full", error=str(error))
            self._ballast.unlink()
            return self._connect(self.file, first=True)

    def lay_ballast(self) -> None:
        """Lay by the room that opening takes on a full disk; where it is full already, later."""
        part = self._ballast.with_suffix(".part")
        try:
            if not self._ballast.exists():
                part.write_bytes(bytes(_BALLAST))
                part.rename(self._ballast)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _connect(self, file: Path, *, first: bool = False) -> sqlite3.Connection:
        database: sqlite3.Connection | None = None
        try:
            database = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=1.0)
            version = prepare(database, file, self._synchronous, check=first and not self._mark.was_clean)
        except (sqlite3.Error, JournalError, ConfigError) as error:
            if database is not None:
                database.close()
            if isinstance(error, sqlite3.Error):
                raise as_journal_error(error, f"{file}: cannot be opened") from error
            raise
        if first:
            self._found_version = version
        return database

    def _take_up_numbers(self, database: sqlite3.Connection, durability: str) -> None:
        last = int(database.execute("SELECT coalesce(max(seq), 0) FROM verdicts").fetchone()[0])
        self.camera_seqs = dict(database.execute("SELECT camera, camera_seq FROM counts"))
        lost = self._found_version == 0 and self._mark.reserved > 0
        self._unwritten.clear()
        spilt = self._spill.read()
        if lost and spilt:  # the triggers' rows are gone with their journal, and the new one gives their numbers again
            spilt = [(header, None) for header, _ in spilt]
            self._spill.replace(spilt)
        for header, row in spilt:
            if database.execute("SELECT 1 FROM verdicts WHERE seq = ?", (header["seq"],)).fetchone() is None:
                self._unwritten.append((header, row))
            self._count(header["camera"], header["camera_seq"])
            last = max(last, header["seq"])
        for camera, number in self._mark.cameras.items():
            self._count(camera, number)
        start = max(last, self._mark.floor)
        # Without power loss the journal and the mark hold all that went out; else only the reservation is sure.
        if lost or self._mark.restored or (self._mark.power_lost and durability == "process"):
            start = max(start, self._mark.reserved)
            self.seq_jump = (last, start + 1)
            # Every camera's own count is at most the station's, so the station's is safe for all of them.
            self.camera_seqs = dict.fromkeys(self.camera_seqs, start)
            self._mark.jumped(start, self.camera_seqs)
        self.last_seq = start

    def _count(self, camera: str, number: int) -> None:
        self.camera_seqs[camera] = max(self.camera_seqs.get(camera, 0), number)

    def number(self, header: Header) -> None:
        """Give a verdict its numbers: the station's and the camera's next."""
        try:
            self._mark.reserve(self.last_seq + 1)
        except JournalError as error:  # the line goes on; only a loss of this journal could now repeat a number
            log.error("numbers_not_reserved", error=str(error))
        self.last_seq += 1
        camera = header["camera"]
        self.camera_seqs[camera] = self.camera_seqs.get(camera, self._mark.camera_start) + 1
        header["seq"], header["camera_seq"] = self.last_seq, self.camera_seqs[camera]

    def commit(
        self,
        verdicts: Sequence[tuple[Header, Trigger | None]],
        accepted: Iterable[Trigger] = (),
        late: Iterable[Header] = (),
    ) -> None:
        """Commit, at once: triggers that were accepted, numbered verdicts with the triggers they answer, late results.

        Raises JournalError where the disk refuses. Then the verdicts say `journalled: false` and are kept, to be
        journalled when that is possible again, and the triggers have no row; late results say so, and are not kept.
        """
        accepted, late = list(accepted), list(late)
        try:
            self._begin()
            for trigger in accepted:
                self._insert_trigger(trigger)
            self._insert_verdicts([(header, trigger.row if trigger else None) for header, trigger in verdicts])
            self._database.executemany(
                "INSERT OR REPLACE INTO late VALUES (?, ?)", [(header["seq"], pack(header)) for header in late]
            )
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            for trigger in accepted:
                trigger.row = None
            for header in late:
                header["journalled"] = False
            self._keep_unwritten([(header, trigger.row if trigger else None) for header, trigger in verdicts])
            raise self._refused(error, "cannot be written") from error
        if self._unwritten:
            self._catch_up()

    def _begin(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def _insert_trigger(self, trigger: Trigger) -> None:
        cursor = self._database.execute(
            "INSERT INTO triggers (camera, trigger_id, part_id, t_trigger, recipe, recipe_version)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(trigger.camera, trigger.trigger_id, trigger.part_id),
                *(trigger.t_trigger, trigger.recipe, trigger.recipe_version),
            ),
        )
        trigger.row = cursor.lastrowid

    def _insert_verdicts(self, verdicts: Sequence[Unwritten]) -> None:
        for h, row in verdicts:
            inserted = self._database.execute(
                "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)",
                (h["seq"], h["camera"], h["camera_seq"], h["t_publish"], h["result"], pack(h)),
            )
            # Only with its own verdict: rows' numbers are used again.
            if row is not None and inserted.rowcount:
                self._database.execute("DELETE FROM triggers WHERE id = ?", (row,))
        counts = {h["camera"]: h["camera_seq"] for h, _ in verdicts}
        self._database.executemany(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (camera) DO UPDATE"
            " SET camera_seq = max(camera_seq, excluded.camera_seq)",
            counts.items(),
        )

    def _keep_unwritten(self, verdicts: list[Unwritten]) -> None:
        if not verdicts:
            return
        for header, _ in verdicts:
            header["journalled"] = False
        if not self._spill.add(verdicts):
            try:
                self._mark.used(verdicts[-1][0]["seq"], self.camera_seqs)
            except JournalError as error:
                log.error("numbers_not_reserved", error=str(error))
        with self._reading:
            self._unwritten.extend(verdicts)

    def _catch_up(self) -> None:
        """The disk takes verdicts again: write some of those that were kept."""
        step = [self._unwritten[i] for i in range(min(_STEP, len(self._unwritten)))]
        try:
            self._begin()
            self._insert_verdicts(step)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            self._damaged |= is_damage(error)
            return
        with self._reading:
            for _ in step:
                self._unwritten.popleft()
        if not self._unwritten:
            self._spill.clear()

    @property
    def unwritten(self) -> int:
        """Published verdicts that are not journalled yet."""
        return len(self._unwritten)

    def unanswered(self) -> list[Trigger]:
        """Triggers accepted by an agent that died before it answered them, oldest first."""
        answered = {row for _, row in self._unwritten}
        rows = self._database.execute(
            "SELECT camera, trigger_id, part_id, t_trigger, recipe, recipe_version, id FROM triggers ORDER BY id"
        )
        return [trigger for trigger in (Trigger(*row) for row in rows) if trigger.row not in answered]

    def replay(self, from_seq: int, to_seq: int | None, limit: int) -> Page:
        """Verdicts from a number on, `limit` at most, and what belongs to them. Raises JournalError.

        A page is also full at `_PAGE_BYTES`, with what belongs to its verdicts: one packed on the event loop holds up
        whatever else is published. Of more remarks on one verdict than are taken now it has the newest.
        """
        last = self.last_seq if to_seq is None else to_seq
        span = "WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?"
        with self._reading:
            kept = [header for header, _ in self._unwritten if from_seq <= header["seq"] <= last]
            try:
                rows = self._reader.execute(
                    f"SELECT seq, header FROM verdicts {span}", (from_seq, last, limit + 1)
                ).fetchall()
                late = _one_page(
                    self._reader.execute(
                        f"SELECT seq, length(header), header FROM late {span}", (from_seq, last, limit)
                    )
                )
                said = _one_page(
                    self._reader.execute(
                        f"SELECT seq, {_REMARK}, id, label, who, note, t FROM feedback WHERE id IN"
                        " (SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY seq ORDER BY id DESC) AS age"
                        " FROM feedback WHERE seq BETWEEN ? AND ?) WHERE age <= ?) ORDER BY seq, id",
                        (from_seq, rows[-1][0] if rows else from_seq, _REMARKS),
                    )
                )
            except sqlite3.Error as error:
                raise self._refused(error, "cannot be read") from error
        found: dict[int, Header] = {header["seq"]: header for header in kept}
        found |= {seq: unpack(header) for seq, header in rows}
        sizes = dict.fromkeys(found, _USUAL_BYTES) | {seq: len(header) for seq, header in rows}
        for seq, size, *_ in (*late, *said):
            sizes[seq] = sizes.get(seq, 0) + size
        full = _first_beyond((sizes[seq] for seq in sorted(found)), _PAGE_BYTES)
        limit = min(limit, max(full, 1))
        headers = [found[seq] for seq in sorted(found)]
        complete, headers = len(headers) <= limit, headers[:limit]
        next_seq = headers[-1]["seq"] + 1 if headers else from_seq
        results = [unpack(header) for seq, _, header in late if seq < next_seq]
        words = [
            dict(zip(("seq", "label", "who", "note", "t"), (seq, *row), strict=True))
            for seq, _, _, *row in sorted(said, key=lambda row: row[2])
            if seq < next_seq
        ]
        return Page(headers, results, next_seq, complete, words)

    def feedback(self, seq: int, label: str, who: str, note: str) -> None:
        """Keep an operator's word on a verdict. Raises JournalError where there is no such verdict, or no room."""
        try:
            if self._database.execute("SELECT 1 FROM verdicts WHERE seq = ?", (seq,)).fetchone() is None:
                raise JournalError(f"there is no verdict {seq} in the journal")
            known = self._database.execute("SELECT count(*) FROM feedback WHERE seq = ?", (seq,)).fetchone()[0]
            if known >= _REMARKS:
                raise JournalError(f"verdict {seq} has {known} remarks already; {_REMARKS} are kept of one verdict")
            if self._remarks_bytes >= _REMARKS_BYTES:
                raise JournalError(
                    f"the journal holds {_REMARKS_BYTES / 1e6:g} MB of feedback already, and takes no more until the "
                    "verdicts that it belongs to are forgotten"
                )
            self._database.execute(
                "INSERT INTO feedback (seq, label, who, note, t) VALUES (?, ?, ?, ?, ?)",
                (seq, label, who, note, time.time_ns()),
            )
            (room,) = self._database.execute(
                f"SELECT {_REMARK_ROOM} FROM feedback WHERE id = last_insert_rowid()"
            ).fetchone()
            self._remarks_bytes += room
        except sqlite3.Error as error:
            raise self._refused(error, "cannot be written") from error

    def drop_old(self, keep_days: float, keep_verdicts: int, keep_mb: float) -> int:
        """Forget verdicts beyond the limits, a step of the oldest ones, the newest always kept; returns how many.

        `keep_mb` limits what the database holds beside feedback, in 1e6 bytes. The room of what is forgotten is used
        again, so that its file stops growing there; a file that was larger before does not shrink.
        """
        try:
            oldest = self._oldest_kept(keep_days)
            if self._gaps is None:
                self._gaps = self._find_gaps()
            too_large = self._held_bytes() - self._remarks_bytes > keep_mb * 1e6
            rows = self._database.execute(
                "SELECT seq, t_publish FROM verdicts WHERE seq < (SELECT max(seq) FROM verdicts) ORDER BY seq LIMIT ?",
                (_STEP,),
            )
            gone = [(seq,) for seq, t in rows if too_large or t < oldest or self._newer(seq) >= keep_verdicts]
            if gone:
                self._begin()
                remarks = f"SELECT coalesce(sum({_REMARK_ROOM}), 0) FROM feedback WHERE seq = ?"
                room = sum(self._database.execute(remarks, number).fetchone()[0] for number in gone)
                for table in ("verdicts", "late", "feedback"):
                    self._database.executemany(f"DELETE FROM {table} WHERE seq = ?", gone)
                self._database.execute("COMMIT")
                self._remarks_bytes -= room
        except sqlite3.Error as error:
            self._roll_back()
            raise self._refused(error, "cannot be written") from error
        return len(gone)

    def _oldest_kept(self, keep_days: float) -> int:
        """UTC ns. It follows the clock no faster than a hundredfold, from the oldest verdict on.

        So a clock that is wrong for an hour costs four days of the record at most, not all of it.
        """
        wanted, now = time.time_ns() - int(keep_days * 86_400e9), time.monotonic()
        if self._horizon is None:
            first = self._database.execute("SELECT t_publish FROM verdicts ORDER BY seq LIMIT 1").fetchone()
            self._horizon = (wanted if first is None else first[0]), now
        before, then = self._horizon
        self._horizon = max(before, min(wanted, before + int((now - then) * 1e9 * _FASTEST))), now
        return min(wanted, self._horizon[0])

    def _newer(self, seq: int) -> int:
        """How many verdicts came after this one: numbers that were jumped over are none."""
        return self.last_seq - seq - sum(size for below, size in self._gaps or () if below >= seq)

    def _find_gaps(self) -> list[tuple[int, int]]:
        """Where numbers were jumped over, from the newest down: the verdict below, and how many at least.

        Gaps come from starts alone (after a power loss, or a backup that was restored). One look a stride finds them:
        to count five million rows would take many seconds. Of each gap less than a stride stays unseen.
        """
        gaps: list[tuple[int, int]] = []
        upper = self.last_seq + 1
        while True:
            (below,) = self._database.execute(
                "SELECT max(seq) FROM verdicts WHERE seq <= ?", (upper - _STRIDE,)
            ).fetchone()
            if below is None:
                return gaps
            if below < upper - _STRIDE:
                gaps.append((int(below), upper - _STRIDE - int(below)))
            upper = int(below)

    def _held_bytes(self) -> int:
        """Of the database's pages that are in use."""
        pages, free, size = (
            int(self._database.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def _room_of_remarks(self) -> int:
        try:
            return int(self._database.execute(f"SELECT coalesce(sum({_REMARK_ROOM}), 0) FROM feedback").fetchone()[0])
        except sqlite3.Error as error:  # a line starts all the same; the next start looks into it
            self._damaged |= is_damage(error)
            return 0

    def checkpoint(self) -> None:
        """Carry the write-ahead log over into the database. Waits for the disk: commits go on meanwhile."""
        try:
            self._keeper.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            raise self._refused(error, "cannot be written") from error

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """One statement for who keeps a table of its own here (recipes.py). Raises JournalError."""
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._roll_back()
            raise self._refused(error, "cannot be used") from error

    def _refused(self, error: sqlite3.Error, what: str) -> JournalError:
        """What to raise. Damage is remembered, so that the next start checks the file and sets it aside."""
        self._damaged |= is_damage(error)
        return as_journal_error(error, f"{self.file}: {what}")

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def close(self) -> None:
        """Let go of the files and the lock. What was numbered is noted, so that nothing need be checked next time,
        unless damage was noticed."""
        for database in (self._keeper, self._reader, self._database):
            database.close()
        try:
            self._mark.used(self.last_seq, self.camera_seqs, clean=not self._damaged)
        except JournalError as error:
            log.error("numbers_not_reserved", error=str(error))
        self._spill.close()
        self._mark.close()
        os.close(self._lock)


def _one_page(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Of rows (number, bytes, ...) by rising number, those that a page may hold: all of a number or none."""
    taken: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        if size > _PAGE_BYTES and row[0] != taken[-1][0]:
            break
        taken.append(row)
        size += row[1]
    return taken


def _first_beyond(sizes: Iterable[int], most: int) -> int:
    """How many of these fit into `most` together."""
    return sum(total <= most for total in itertools.accumulate(sizes))
