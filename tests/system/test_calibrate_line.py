"""Calibration from the verdicts of a running line: what counts, what does not, and what is too little."""

import json
import subprocess
from collections.abc import Callable

import numpy as np
from safetensors.numpy import save_file
from station import CLI, Make, Station

from flawline.config.recipe import Recipe
from flawline.config.recipe_file import update_recipe
from flawline.config.sources import load_settings


def calibrate(station: Station, *options: str, file: bool = True) -> subprocess.CompletedProcess[str]:
    """`flawline calibrate --json` as it ran; without `file` nothing is written."""
    config = ["--config", str(station.config)] if file else []
    command = [*CLI, "calibrate", "--endpoint", station.control, *config, "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


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


def test_a_threshold_is_written_beside_the_recipe_that_gave_the_scores_alone(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]}, '[recipes.default]\nobject = "nut"\n').start()
    station.trigger("top", *(str(number) for number in range(4)))
    station.until("verdict", 4)
    # the file has changed since, and the line was not reloaded
    text = station.config.read_text()
    changed = text.replace('object = "nut"', 'object = "bolt"\nroi = [0, 0, 9, 9]\nprompt = {kernel_size = 31}')
    station.config.write_text(changed.replace("kernel_size = 31", "kernel_size = 31, spacing = 9.0"))
    before = station.config.read_text()
    refused = calibrate(station, "--last", "4")
    assert refused.returncode == 2
    assert "the difference is in object, prompt.kernel_size, prompt.spacing and 1 more" in refused.stderr
    assert station.config.read_text() == before
    # what is printed is of the line's recipe, also where another one was activated with a table
    nut = Recipe(object="nut")
    assert json.loads(calibrate(station, "--last", "4", file=False).stdout)["recipe_sha256"] == nut.scale_sha256()
    station.config.write_text(text)
    station.ask("recipe.activate", recipe="default", table={"object": "screw", "threshold": 0.7})
    station.trigger("top", "A", "B")
    station.until("verdict", 6)
    printed = json.loads(calibrate(station, "--last", "4", file=False).stdout)
    assert (printed["count"], printed["recipe_sha256"]) == (2, Recipe(object="screw").scale_sha256())
    assert "the difference is in object:" in calibrate(station, "--last", "4").stderr
    assert station.config.read_text() == text
    station.config.write_text(text.replace("nut", 'screw"\nmin_defect_area_px = 9\nqueue = "latest'))
    assert "the difference is in min_defect_area_px:" in calibrate(station, "--last", "4").stderr
    station.config.write_text(text.replace("nut", "screw"))
    assert calibrate(station, "--last", "4").returncode == 0
    calibrated = load_settings(station.config, environ={}).recipes["default"]
    assert calibrated.calibration is not None
    assert calibrated.calibration.recipe_sha256 == calibrated.scale_sha256()
    assert calibrated.calibration.min_defect_area_px == calibrated.min_defect_area_px
    station.stop()


def test_cameras_on_two_versions_of_a_recipe(make_station: Make) -> None:
    """Each version's parts are told apart, wherever they lie between one another."""
    station = make_station({"top": [("good", 0)], "side": [("bad", 0)]}, "[recipes.default]\nthreshold = 0.4\n").start()
    station.trigger("side", "an older version")
    station.ask("recipe.activate", camera="side", recipe="default", table={"threshold": 0.3})
    for number in range(5):
        station.trigger("side", f"S{number}")
        station.until("verdict", 2 * number + 2)
        station.trigger("top", f"T{number}")
        station.until("verdict", 2 * number + 3)
    newest = calibrate(station, "--last", "9", file=False)
    said = json.loads(newest.stdout)
    # side's part before the switch was judged by top's version too
    assert (said["count"], said["recipe_version"], said["cameras"]) == (6, 1, ["side", "top"])
    assert "verdicts of side by another version of recipe 'default'" in newest.stderr
    of_top = calibrate(station, "--last", "9", "--camera", "top", file=False)
    assert "another version" not in of_top.stderr
    said = json.loads(of_top.stdout)
    assert (said["count"], said["cameras"], said["threshold"] < 0.2) == (5, ["top"], True)
    said = json.loads(calibrate(station, "--last", "9", "--camera", "side", file=False).stdout)
    assert (said["count"], said["recipe_version"], said["threshold"] > 0.9) == (5, 2, True)
    # a camera that changes its version ends what it says of that version
    station.ask("recipe.activate", camera="top", recipe="default", version=2)
    station.trigger("top", "Z")
    station.until("verdict", 12)
    said = json.loads(calibrate(station, "--last", "9", file=False).stdout)
    assert (said["count"], said["recipe_version"], said["cameras"]) == (1, 2, ["top"])
    wrong = calibrate(station, "--last", "9", "--camera", "tpo", file=False)
    assert (wrong.returncode, "--camera: there is no 'tpo' (there are: top, side)" in wrong.stderr) == (2, True)
    station.stop()


def test_scores_at_another_precision_do_not_count(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]}, "[model]\nthreads = 1\n")
    text = station.config.read_text()
    said = []
    for number, model in enumerate(("threads = 1", 'precision = "bf16"', 'precision = "fp32"')):
        station.config.write_text(text.replace("threads = 1", model))
        station.start()
        station.trigger("top", f"A{number}", f"B{number}")
        station.until("verdict", 2 * number + 2)
        said.append(json.loads(calibrate(station, "--last", "9", file=False).stdout))
        if number == 2:
            assert calibrate(station, "--last", "9").returncode == 0
        station.stop()
    precisions = [verdict["provenance"]["precision"] for verdict in station.of("verdict")]
    assert precisions == [None, None, "bfloat16", "bfloat16", "float32", "float32"]
    # verdicts that do not say it, as an older flawline's, count as those that do
    assert [(one["count"], one.get("precision")) for one in said] == [(2, None), (4, "bf16"), (2, "fp32")]
    calibration = load_settings(station.config, environ={}).recipes["default"].calibration
    assert calibration is not None
    assert calibration.precision == "fp32"


def test_parts_without_a_score_are_taken_as_rejects(make_station: Make) -> None:
    """What takes long is what is suspicious: to leave it out would promise too much."""
    orders = [*[("good", 0)] * 16, ("degraded", 1500), ("bad", 1300), ("hang", 0)]
    rules = "[recipes.default]\ndeadline_ms = 1000\n[worker]\njob_limit_s = 4.0\n"
    station = make_station({"top": orders}, rules).start()
    for number in range(len(orders)):
        station.trigger("top", str(number))
        station.until("verdict", number + 1)
        if number >= 17:
            station.until("late", number - 16)  # also where it says that the worker was lost
        elif number == 16:
            station.wait_for(lambda: any(mask.get("refined") for mask in station.of("mask")))
    assert [verdict["reason"] for verdict in station.of("verdict")[-3:]] == ["clip_only", "deadline", "deadline"]
    done = calibrate(station, "--last", "100", "--target-fpr", "0.4", file=False)
    said = json.loads(done.stdout)
    # the late one has its score; the two without may be rejected, the best of the others is 0.9
    assert (said["count"], said["without_score"], said["rejected"]) == (19, 2, 3)
    assert said["threshold"] < 0.2
    assert "2 of the last 19 parts have no score" in done.stderr
    assert "2 of the parts without a score" in said["method"]
    promised = json.loads(calibrate(station, "--last", "100", file=False).stdout)
    assert (promised["rejected"], promised["false_reject_bound"] > 0.29) == (2, True)
    assert 0.9 < promised["threshold"] < 0.91
    refused = calibrate(station, "--last", "100", "--target-fpr", "0.2")
    assert refused.returncode == 2
    assert "more than the 0 that a false reject rate of at most 0.2 allows" in refused.stderr
    assert "deadline_ms" in refused.stderr
    none = calibrate(station, "--last", "1")
    assert (none.returncode, "1 of the last 1 parts have no score" in none.stderr) == (2, True)
    station.stop()
