"""Calibration from the verdicts of a running line: what counts, what does not, and what is too little."""

import json
import subprocess
from collections.abc import Callable

import numpy as np
from safetensors.numpy import save_file
from station import CLI, Station

from flawline.config.recipe_file import update_recipe
from flawline.config.sources import load_settings


def test_a_threshold_from_the_last_parts_of_a_running_line(make_station: Callable[..., Station]) -> None:
    # an error is no inspection and says nothing of the part; the oldest part is beyond --last
    orders = [("bad", 0), *[("good", 0)] * 10, ("wrong", 0), *[("good", 0)] * 4]
    station = make_station({"top": orders}).start()
    station.trigger("top", *(str(number) for number in range(len(orders))))
    station.until("verdict", len(orders))
    command = [*CLI, "calibrate", "--endpoint", station.control, "--config", str(station.config), "--json"]
    few = subprocess.run([*command, "--last", "14", "--target-fpr", "0.1"], capture_output=True, text=True, timeout=60)
    assert few.returncode == 2
    assert "29 are needed" in few.stderr
    before = station.config.read_text()
    done = subprocess.run([*command, "--last", "14", "--target-fpr", "0.2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["count"], said["rejected"], said["bundle"]) == (14, 0, "scripted")
    assert np.float32(0.1) < said["threshold"] < 0.11
    assert station.config.read_text().startswith(before)
    recipe = load_settings(station.config, environ={}).recipes["default"]
    assert recipe.threshold == said["threshold"]
    all_parts = [*command, "--last", "100", "--target-fpr", "0.2", "--dry-run"]
    done = subprocess.run(all_parts, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["count"] == 15
    assert json.loads(done.stdout)["threshold"] > 0.9  # 15 good parts of which one scores 0.9: none may be rejected
    # a threshold found without a memory is none for a recipe with one
    memory = station.folder / "default.0001.aaaaaaaaaaaa.safetensors"
    save_file({"cells": np.zeros(1, np.float32)}, memory, {"sha256": "a" * 64})
    update_recipe(station.config, "default", {"memory": str(memory)})
    before = station.config.read_text()
    other = subprocess.run(
        [*command, "--last", "14", "--target-fpr", "0.2"], capture_output=True, text=True, timeout=60
    )
    assert other.returncode == 2
    assert "with no memory" in other.stderr
    assert "the memory aaaaaaaaaaaa" in other.stderr
    assert station.config.read_text() == before
    station.stop()
