"""Which recipes a station knows after a restart, and what it says of one that it can use no more."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from flawline.agent.journal import Journal
from flawline.agent.recipes import RecipeBook
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


def test_a_lost_memory_is_said_and_what_judges_instead(tmp_path: Path) -> None:
    memory = tmp_path / "default.0001.aaaaaaaaaaaa.safetensors"
    save_file({"cells": np.zeros(1, np.float32)}, memory, {"sha256": "a" * 64})
    journal = Journal(tmp_path)
    before = RecipeBook(settings(), journal)
    learnt = before.version_of("default", Recipe(memory=str(memory)))
    before.activate(["top"], learnt)
    before.keep([learnt], ["top"])
    assert RecipeBook(settings(), journal).of("top").key == "default@2"
    memory.unlink()
    with capture_logs() as said:
        again = RecipeBook(settings(), journal)
    assert again.of("top").key == "default@1"
    (error,) = [entry for entry in said if entry["log_level"] == "error"]
    assert (error["recipe"], error["by"], error["camera"]) == ("default@2", "default@1", "top")
    assert str(memory) in error["error"]
    journal.close()
