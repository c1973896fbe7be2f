"""An upgrade keeps journal and numbers: a station's folder as the first schema left it, opened by this one."""

import sqlite3
import struct
import zlib
from pathlib import Path

import msgpack

from flawline.agent.journal import Journal
from flawline.agent.journal_schema import VERSION
from flawline.agent.recipes import RecipeBook
from flawline.config.recipe import Recipe
from flawline.config.settings import Settings
from flawline.config.settings_camera import CameraSettings

SCHEMA_1 = """
CREATE TABLE verdicts (
  seq INTEGER PRIMARY KEY, camera TEXT NOT NULL, camera_seq INTEGER NOT NULL,
  t_publish INTEGER NOT NULL, result TEXT NOT NULL, header BLOB NOT NULL);
CREATE INDEX verdicts_by_camera ON verdicts (camera, camera_seq);
CREATE TABLE triggers (
  id INTEGER PRIMARY KEY, camera TEXT NOT NULL, trigger_id TEXT, part_id TEXT,
  t_trigger INTEGER NOT NULL, recipe TEXT NOT NULL, recipe_version INTEGER NOT NULL);
CREATE TABLE feedback (
  id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, label TEXT NOT NULL, who TEXT NOT NULL, note TEXT NOT NULL,
  t INTEGER NOT NULL);
PRAGMA user_version=1;
"""


def write_first_schema(folder: Path) -> None:
    """Seven verdicts of two cameras, an open trigger, an operator's word, and that time's number mark."""
    folder.mkdir(parents=True)
    database = sqlite3.connect(folder / "journal.sqlite")
    database.execute("PRAGMA journal_mode=WAL")
    database.executescript(SCHEMA_1)
    for seq in range(1, 8):
        camera, camera_seq = ("top", seq) if seq <= 4 else ("side", seq - 4)
        header = {"seq": seq, "camera": camera, "camera_seq": camera_seq, "result": "pass"}
        row = (seq, camera, camera_seq, seq, "pass", msgpack.packb(header))
        database.execute("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", row)
    database.execute("INSERT INTO triggers VALUES (3, 'top', 'T-9', 'P-9', 5, 'default', 1)")
    database.execute("INSERT INTO feedback VALUES (1, 4, 'bad', 'anna', 'a scratch', 6)")
    database.commit()
    database.close()
    body = struct.pack("<8sQQ", b"flawseq1", 1000, 0)
    (folder / "seq.mark").write_bytes(body + struct.pack("<I", zlib.crc32(body)))


def test_a_journal_of_the_first_schema_goes_on(tmp_path: Path) -> None:
    write_first_schema(tmp_path / "line1")
    for start in (8, 9):  # brought up to date once, then opened as it is
        journal = Journal(tmp_path / "line1")
        assert (journal.seq_jump, journal.set_aside) == (None, None)
        assert [trigger.trigger_id for trigger in journal.unanswered()] == ["T-9"]
        verdicts = journal.replay(1, None, 100).verdicts
        assert [verdict["seq"] for verdict in verdicts] == list(range(1, start))
        assert journal.query("SELECT who, note FROM feedback WHERE seq = 4") == [("anna", "a scratch")]
        header = {"camera": "side", "t_publish": start, "result": "fail"}
        journal.number(header)
        assert (header["seq"], header["camera_seq"]) == (start, start - 4)
        journal.commit([(header, None)])
        assert journal.query("PRAGMA user_version") == [(VERSION,)]
        journal.close()


def test_what_was_activated_under_the_second_schema_goes_on(tmp_path: Path) -> None:
    """Its table lacks a column: whether the file said it is found out at the first start."""
    cameras = [CameraSettings(name=name) for name in ("top", "side")]
    file = Settings(cameras=cameras, recipes={"default": Recipe(), "bolt": Recipe(object="bolt")})
    journal = Journal(tmp_path / "line1")
    book = RecipeBook(file, journal)
    own = book.version_of("bolt", Recipe(object="bolt", threshold=0.7))
    book.activate(["top"], book.find("bolt", 1))
    book.activate(["side"], own)
    book.keep([own], ["top", "side"])
    journal.query("ALTER TABLE active DROP COLUMN follows")
    journal.query("PRAGMA user_version=2")
    journal.close()
    for table, top in ((file.recipes["bolt"], "bolt@1"), (Recipe(object="bolt", threshold=0.1), "bolt@3")):
        journal = Journal(tmp_path / "line1")
        book = RecipeBook(Settings(cameras=cameras, recipes={"default": Recipe(), "bolt": table}), journal)
        assert {camera: book.of(camera).key for camera in ("top", "side")} == {"top": top, "side": "bolt@2"}
        assert journal.query("PRAGMA user_version") == [(VERSION,)]
        journal.close()
