"""What operators said of verdicts, and what was judged, read from a station's journal: an agent may be writing it."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from flawline.agent.journal_schema import VERSION
from flawline.agent.station_folder import JOURNAL
from flawline.agent.wire import Header, unpack
from flawline.config.errors import ConfigError, JournalError
from flawline.config.recipe import Recipe

GOOD = frozenset({"good", "ok", "pass", "false_reject"})
BAD = frozenset({"bad", "nok", "fail", "defect", "false_accept"})
"""Labels of `feedback` by which an operator says what the part is, whatever the verdict was. Others are remarks."""
_AT_ONCE = 500  # numbers in one statement


@dataclass(frozen=True)
class Mark:
    """An operator's last word on one verdict."""

    seq: int
    good: bool  # what the part is
    label: str
    who: str
    note: str
    t: int  # UTC, ns
    header: Header  # of the verdict; of the late result where there is one

    @property
    def camera(self) -> str:
        return str(self.header["camera"])

    @property
    def recipe(self) -> str:
        return str(self.header["recipe"]["id"])

    @property
    def wrong_reject(self) -> bool:
        """A good part that was found to have defects."""
        return self.good and self.header["result"] == "fail"


class Record:
    """Reads a journal. Use `reading` to open one."""

    def __init__(self, database: sqlite3.Connection, file: Path) -> None:
        self._database = database
        self.file = file

    def marks(self) -> list[Mark]:
        """Of every verdict that has one that says what the part is, the newest, by number.

        A later remark that says neither takes the mark back.
        """
        newest = {
            seq: (label, who, note, t)
            for seq, label, who, note, t in self._database.execute(
                "SELECT seq, label, who, note, t FROM feedback ORDER BY id"
            )
        }
        headers = self.headers(newest)
        marks = []
        for seq, (label, who, note, t) in sorted(newest.items()):
            word = label.strip().lower().replace(" ", "_").replace("-", "_")
            if seq in headers and word in GOOD | BAD:
                marks.append(Mark(seq, word in GOOD, label, who, note, t, headers[seq]))
        return marks

    def headers(self, numbers: Iterable[int]) -> dict[int, Header]:
        """The verdicts of these numbers that the journal still has; a late result stands for its verdict."""
        wanted = sorted(numbers)
        found: dict[int, Header] = {}
        for table in ("verdicts", "late"):
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                places = ",".join("?" * len(some))
                rows = self._database.execute(f"SELECT seq, header FROM {table} WHERE seq IN ({places})", some)
                found |= {seq: unpack(header) for seq, header in rows}
        return found

    def judging(self, name: str, configured: Mapping[str, Recipe]) -> tuple[Recipe, int | None]:
        """The recipe as it judges on the line, and its version where it was activated by command (or learnt there).

        Such a version holds until the configuration says something else for its camera (recipes.py).
        """
        rows = self._database.execute(
            "SELECT judging.version, judging.content, base.id, base.content, active.follows FROM active"
            " JOIN recipes AS judging ON judging.id = active.id AND judging.version = active.version"
            " JOIN recipes AS base ON base.id || '@' || base.version = active.base"
            " WHERE active.id = ? ORDER BY judging.version DESC",
            (name,),
        )
        for version, content, base, base_content, follows in rows:
            try:
                if configured.get(base) != Recipe.model_validate_json(base_content):
                    continue
                if follows:
                    break
                recipe = Recipe.model_validate_json(content)
            except ValidationError:  # of an older flawline
                continue
            return recipe, None if recipe == configured[name] else int(version)
        return configured[name], None


@contextmanager
def reading(folder: Path) -> Iterator[Record]:
    """The record in a station's folder. Raises ConfigError where there is none, JournalError where it is unreadable."""
    file = folder / JOURNAL
    if not file.is_file():
        raise ConfigError(
            f"{file}: there is no journal here: no station has run with this `journal.path` and `station`"
        )
    try:
        database = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=30)
        try:
            if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                raise ConfigError(f"{file}: was written by another flawline; run this one on it first")
            yield Record(database, file)
        finally:
            database.close()
    except sqlite3.Error as error:
        raise JournalError(f"{file}: cannot be read: {error}") from error
