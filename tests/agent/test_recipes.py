"""Which recipes a station knows after a restart, and what it says of one that it can use no more."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from flawline.agent.feedback import reading
from flawline.agent.journal import Journal
from flawline.agent.recipes import RecipeBook
from flawline.agent.verdict import Trigger
from flawline.config.recipe import Recipe
from flawline.config.settings import Settings
from flawline.config.settings_camera import CameraSettings


def settings(**recipes: Recipe) -> Settings:
    return Settings(cameras=[CameraSettings(name="top")], recipes={"default": Recipe()} | recipes)


def test_a_worker_need_not_know_what_the_station_once_had(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    before = RecipeBook(settings(old=Recipe(object="nut"), bolt=Recipe(object="bolt")), journal)
    changed = before.version_of("bolt", Recipe(object="bolt", threshold=0.3))
    before.activate(["top"], changed)
    before.keep([changed], ["top"])
    now = RecipeBook(settings(bolt=Recipe(object="bolt")), journal)
    assert now.of("top").key == "bolt@2"
    assert now.known("old@1") is not None
    # the configured version too: a reload may put a camera on it
    assert now.for_worker().keys() == {"default@1", "bolt@1", "bolt@2"}
    journal.close()


def station_with_a_memory(tmp_path: Path) -> tuple[Path, Journal]:
    """The file, and the journal of a station whose camera was put on it by command."""
    memory = tmp_path / "default.0001.aaaaaaaaaaaa.safetensors"
    save_file({"cells": np.zeros(1, np.float32)}, memory, {"sha256": "a" * 64})
    journal = Journal(tmp_path)
    before = RecipeBook(settings(), journal)
    learnt = before.version_of("default", Recipe(memory=str(memory)))
    before.activate(["top"], learnt)
    before.keep([learnt], ["top"])
    return memory, journal


def test_a_lost_memory_is_said_and_what_judges_instead(tmp_path: Path) -> None:
    memory, journal = station_with_a_memory(tmp_path)
    assert RecipeBook(settings(), journal).of("top").key == "default@2"
    memory.unlink()
    with capture_logs() as said:
        again = RecipeBook(settings(), journal)
    assert again.of("top").key == "default@1"
    (error,) = [entry for entry in said if entry["log_level"] == "error"]
    assert (error["recipe"], error["by"], error["camera"]) == ("default@2", "default@1", "top")
    assert str(memory) in error["error"]
    journal.close()


def test_a_memory_whose_head_is_nested_without_end_is_a_damaged_one(tmp_path: Path) -> None:
    memory, journal = station_with_a_memory(tmp_path)
    memory.write_bytes((1 << 20).to_bytes(8, "little") + b"[" * (1 << 20))
    with capture_logs() as said:
        assert RecipeBook(settings(), journal).of("top").key == "default@1"
    (error,) = [entry for entry in said if entry["log_level"] == "error"]
    assert error["error"] == f"{memory}: is not a readable memory"
    journal.close()


def test_what_was_activated_out_of_the_file_follows_the_file_over_a_restart(tmp_path: Path) -> None:
    """Also where what was activated can be used no more."""
    memory = tmp_path / "bolt.0001.aaaaaaaaaaaa.safetensors"
    save_file({"cells": np.zeros(1, np.float32)}, memory, {"sha256": "a" * 64})
    journal = Journal(tmp_path)
    file = settings(bolt=Recipe(object="bolt", memory=str(memory)))
    book = RecipeBook(file, journal)
    book.activate(["top"], book.find("bolt"))
    book.keep([], ["top"])
    assert RecipeBook(file, journal).of("top").key == "bolt@1"
    memory.unlink()
    changed = settings(bolt=Recipe(object="bolt", threshold=0.3))
    for _ in range(2):  # it is kept, so that the second start finds it as it is
        again = RecipeBook(changed, journal)
        assert again.of("top").key == "bolt@2"
        assert again.for_worker().keys() == {"default@1", "bolt@2"}
    with reading(tmp_path) as record:
        assert record.judging("bolt", changed.recipes) == (changed.recipes["bolt"], None)
    assert RecipeBook(settings(), journal).of("top").key == "bolt@2", "the file does not have it any more"
    journal.close()


def test_a_key_that_a_newer_flawline_knows_makes_no_new_version(tmp_path: Path) -> None:
    """So what was activated holds over an upgrade, too."""
    journal = Journal(tmp_path)
    book = RecipeBook(settings(), journal)
    own = book.version_of("default", Recipe(threshold=0.7))
    book.activate(["top"], own)
    book.keep([own], ["top"])
    for version in (1, 2):  # as a flawline without `memory_share` kept them
        ((text,),) = journal.query("SELECT content FROM recipes WHERE version = ?", (version,))
        older = json.dumps({key: value for key, value in json.loads(text).items() if key != "memory_share"})
        values = (older, hashlib.sha256(older.encode()).hexdigest(), version)
        journal.query("UPDATE recipes SET content = ?, sha256 = ? WHERE version = ?", values)
    again = RecipeBook(settings(), journal)
    assert again.of("top").key == "default@2"
    assert again.for_worker().keys() == {"default@1", "default@2"}
    with reading(tmp_path) as record:
        assert record.judging("default", settings().recipes) == (Recipe(threshold=0.7), 2)
    journal.close()


def test_a_content_of_its_own_stays_until_the_file_says_the_same(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    book = RecipeBook(settings(bolt=Recipe(object="bolt")), journal)
    own = book.version_of("bolt", Recipe(object="bolt", threshold=0.7))
    book.activate(["top"], own)
    book.keep([own], ["top"])
    of_camera = {"top": "default"}

    def read(threshold: float, recipes: RecipeBook) -> str:
        configured = recipes.configured(settings(bolt=Recipe(object="bolt", threshold=threshold)))
        recipes.keep(configured.values(), recipes.take_up(configured, of_camera))
        return recipes.of("top").key

    assert read(0.1, book) == "bolt@2"
    book = RecipeBook(settings(bolt=Recipe(object="bolt", threshold=0.2)), journal)
    assert book.of("top").key == "bolt@2"
    # written into the file it is the file's, and goes on with it
    assert read(0.7, book) == "bolt@2"
    book = RecipeBook(settings(bolt=Recipe(object="bolt", threshold=0.8)), journal)
    assert book.of("top").key == "bolt@5"
    assert read(0.9, book) == "bolt@6"
    # an earlier version, called back by its number, is not what the file says
    book.activate(["top"], book.find("bolt", 1))
    assert read(0.2, book) == "bolt@1"
    journal.close()


def test_contents_that_were_not_used_for_long_are_forgotten_and_no_number_is_given_again(tmp_path: Path) -> None:
    """However many a client activates: neither memory nor journal nor a reply grows with them."""
    journal = Journal(tmp_path)
    book = RecipeBook(settings(bolt=Recipe(object="bolt")), journal)

    def activate(name: str, recipe: Recipe) -> str:
        version = book.version_of(name, recipe)
        book.activate(["top"], version)
        book.keep([version], ["top"])
        return version.key

    def kept() -> set[str]:
        return {
            f"{name}@{version}" for name, version in journal.query("SELECT id, version FROM recipes WHERE id <> ''")
        }

    for number in range(10):
        assert activate("nut", Recipe(object=f"nut {number}")) == f"nut@{number + 1}"
    owed = Trigger("top", None, None, 1, "nut", 10)
    journal.commit([], [owed])
    given = [activate(f"x{number}", Recipe(object=f"part {number}")) for number in range(200)]
    assert {"default@1", "bolt@1", "nut@10", *given[136:]} <= kept()
    assert not {"nut@9", *given[:135]} & kept()
    assert len(kept()) <= 64 + 4
    assert len(book.list()["recipes"]) <= 64 + 4
    again = RecipeBook(settings(bolt=Recipe(object="bolt")), journal)
    assert again.of("top").key == given[-1]
    assert {"default@1", "bolt@1"} <= {f"{one['id']}@{one['version']}" for one in again.list()["recipes"]}
    for one in (book, again):
        for number in range(135):
            assert one.version_of(f"x{number}", Recipe(object="another")).version > int(given[number].split("@")[1])
        assert one.version_of("nut", Recipe(object="nut 3")).version > 10
        assert one.version_of("x199", Recipe(object="part 199")).key == given[-1]
    journal.close()


def test_a_journal_full_of_contents_is_read_and_shrinks(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    RecipeBook(settings(bolt=Recipe(object="bolt")), journal)
    for number in range(300):  # as a flawline kept them that forgot none
        content = Recipe(object=f"nut {number}").model_dump_json() if number % 2 else '{"treshold": 1}'
        journal.query("INSERT INTO recipes VALUES ('nut', ?, 'x', ?, ?)", (number + 1, content, 2 * 10**18 + number))
    book = RecipeBook(settings(bolt=Recipe(object="bolt")), journal)
    assert book.of("top").key == "default@1"
    assert book.find("bolt").key == "bolt@1"
    assert book.find("nut").key == "nut@300"
    assert book.version_of("nut", Recipe(object="nut 1")).key == "nut@301"
    assert journal.query("SELECT count(*) FROM recipes")[0][0] <= 64 + 2
    journal.close()


def test_a_list_of_recipes_is_no_larger_than_a_reply_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flawline.agent.recipes._LIST_BYTES", 30_000)
    journal = Journal(tmp_path)
    book = RecipeBook(settings(), journal)
    for number in range(60):
        book.activate(["top"], book.version_of("nut", Recipe(object=f"nut {number}")))
    listed = book.list()
    keys = [f"{one['id']}@{one['version']}" for one in listed["recipes"]]
    assert len(json.dumps(listed)) < 40_000
    assert keys[0] == "default@1"
    assert keys[1:] == [f"nut@{number}" for number in range(60 - len(keys) + 2, 61)]
    assert listed["left_out"] == 61 - len(keys) > 0
    journal.close()


def test_a_calibration_at_another_precision_is_said_once(tmp_path: Path) -> None:
    made = {"date": "2026-01-02", "count": 299, "rejected": 0, "method": "order statistic", "target_fpr": 0.01}
    made |= {"confidence": 0.95, "false_reject_bound": 0.01, "threshold": 0.5, "bundle": "demo"}
    made |= {"bundle_sha256": "a" * 64, "precision": "fp32"}
    journal = Journal(tmp_path)
    book = RecipeBook(settings(default=Recipe.model_validate({"threshold": 0.5, "calibration": made})), journal)
    with capture_logs() as said:
        for precision in ("float32", None, "bfloat16", "bfloat16"):  # as a worker says it; a replaced one says it again
            book.judged_by("demo", "a" * 64, precision)
    (warning,) = said
    assert warning["event"] == "calibration_does_not_hold"
    assert "calibrated at fp32, now the models judge at bf16" in warning["reason"]
    journal.close()
