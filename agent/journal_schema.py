"""The journal's tables, and how a database becomes one: pragmas, check, schema version."""

import sqlite3
from pathlib import Path

from flawline.config.errors import ConfigError, JournalError

VERSION = 3


class CorruptJournal(JournalError):
    """The file is there but is no journal any more: it is set aside."""


_TABLES = """
CREATE TABLE IF NOT EXISTS verdicts (
  seq INTEGER PRIMARY KEY, camera TEXT NOT NULL, camera_seq INTEGER NOT NULL,
  t_publish INTEGER NOT NULL, result TEXT NOT NULL, header BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS late (seq INTEGER PRIMARY KEY, header BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS counts (camera TEXT PRIMARY KEY, camera_seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS triggers (
  id INTEGER PRIMARY KEY, camera TEXT NOT NULL, trigger_id TEXT, part_id TEXT,
  t_trigger INTEGER NOT NULL, recipe TEXT NOT NULL, recipe_version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS feedback (
  id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, label TEXT NOT NULL, who TEXT NOT NULL, note TEXT NOT NULL,
  t INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS feedback_by_seq ON feedback (seq);
CREATE TABLE IF NOT EXISTS recipes (
  id TEXT NOT NULL, version INTEGER NOT NULL, sha256 TEXT NOT NULL, content TEXT NOT NULL, t INTEGER NOT NULL,
  PRIMARY KEY (id, version));
CREATE TABLE IF NOT EXISTS active (
  camera TEXT PRIMARY KEY, id TEXT NOT NULL, version INTEGER NOT NULL, base TEXT NOT NULL, follows INTEGER);
"""


def prepare(database: sqlite3.Connection, file: Path, synchronous: str, *, check: bool) -> int:
    """Make the tables, or bring older ones up to date; returns the version that was found, 0 for an empty file.

    Raises ConfigError, CorruptJournal, sqlite3.Error.
    """
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(f"PRAGMA synchronous={synchronous}")
    # A checkpoint waits for the disk: it is done apart, never inside a commit that a deadline waits for.
    database.execute("PRAGMA wal_autocheckpoint=0")
    # In kB. Verdicts are added at one end and forgotten at the other, so more pages help nobody; SQLite's default, 2000
    # for each connection, would fill up over the first thousands of verdicts.
    database.execute("PRAGMA cache_size=-256")
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise ConfigError(f"{file}: was written by a newer flawline (schema {version})")
    if check and database.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise CorruptJournal(f"{file}: is corrupt")
    if version < VERSION:
        database.executescript(_TABLES)
        if "follows" not in [row[1] for row in database.execute("PRAGMA table_info(active)")]:  # of schema 2
            database.execute("ALTER TABLE active ADD COLUMN follows INTEGER")
        database.execute("INSERT OR IGNORE INTO counts SELECT camera, max(camera_seq) FROM verdicts GROUP BY camera")
        database.execute(f"PRAGMA user_version={VERSION}")
    return version


def read_all_that_a_start_needs(database: sqlite3.Connection, file: Path) -> None:
    """Find damage while the file can still be set aside: also after a stop in order, which spares the whole check.

    Raises CorruptJournal, sqlite3.Error.
    """
    for table in ("verdicts ORDER BY seq DESC LIMIT 1", "counts", "triggers", "recipes", "active"):
        try:
            for _ in database.execute(f"SELECT * FROM {table}"):
                pass
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:  # this version has such a table
                raise CorruptJournal(f"{file}: is damaged: {error}") from error
            raise


def is_damage(error: sqlite3.Error) -> bool:
    """True where the file itself is wrong, false where the disk is full or will not answer."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # not SQLite's own: a text that is not UTF-8
        return isinstance(error, sqlite3.OperationalError)
    return int(code) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def as_journal_error(error: sqlite3.Error, what: str) -> JournalError:
    """What SQLite said, told apart: a damaged file stays damaged, a full disk or a lock passes."""
    if is_damage(error):
        return CorruptJournal(f"{what}: it is damaged ({error}); a start sets it aside")
    return JournalError(f"{what}: {error}")
