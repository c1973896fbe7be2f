"""SIGHUP while the line runs: what is taken up, what is named, and that a wrong file changes nothing."""

import json
import signal
import time
from typing import Any

import pytest
from station import Make, Station

from flawline.agent.reload import _is_hot


def reload(station: Station) -> dict[str, Any]:
    """Send SIGHUP; the log's line that says what came of it."""
    assert station.process is not None
    before = len(station.log.read_text())
    station.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for line in station.log.read_text()[before:].splitlines():
            if line.startswith("{") and json.loads(line)["event"] in ("reloaded", "reload_refused"):
                return dict(json.loads(line))
        time.sleep(0.05)
    raise AssertionError(station.log.read_text())


def test_what_is_hot_is_taken_up_and_the_rest_is_named(make_station: Make) -> None:
    recipes = "[recipes.default]\nthreshold = 0.4\n[recipes.other]\nthreshold = 0.7\n"
    station = make_station({"top": [("bad", 0)], "side": [("good", 0)]}, recipes).start()
    original = station.config.read_text()
    station.ask("recipe.activate", camera="side", recipe="other")
    changed = original.replace("threshold = 0.4", "threshold = 0.6\ndeadline_ms = 9000\nignore = [[0, 0, 9, 9]]")
    changed = changed.replace("[publish]\n", '[publish]\nmasks = "never"\nhigh_water_mark = 7\n')
    station.config.write_text(changed + '[log]\nlevel = "debug"\n')
    said = reload(station)
    hot = ["log.level", "publish.masks"] + [f"recipes.default.{key}" for key in ("deadline_ms", "ignore", "threshold")]
    assert (said["event"], said["taken_up"]) == ("reloaded", hot)
    assert said["needs_restart"] == ["publish.high_water_mark"]
    # What the file says anew for a camera's recipe holds there, as at a restart, over what was activated.
    new = {"id": "default", "version": 2}
    assert station.status()["recipe"] == {"top": new, "side": new}
    assert station.ask("threshold.get", camera="top")["threshold"] == 0.6
    station.trigger("top", "A")
    verdict = station.until("verdict", 1)[0]
    assert (verdict["result"], verdict["recipe"], verdict["deadline_ms"]) == ("fail", new, 9000)
    while station.receive(0.3):
        pass
    assert station.of("mask") == []
    # Back again: the former content gets its former number, and masks go out again.
    station.config.write_text(original)
    assert reload(station)["event"] == "reloaded"
    assert station.status()["recipe"]["top"] == {"id": "default", "version": 1}
    station.trigger("top", "B")
    assert station.until("mask", 1)[0]["seq"] == 2
    station.kill()
    station.start()
    assert station.status()["recipe"] == {
        "top": {"id": "default", "version": 1},
        "side": {"id": "default", "version": 1},
    }
    station.stop()


def test_a_product_changed_over_by_command_follows_its_recipe_in_the_file(make_station: Make) -> None:
    recipes = "[recipes.default]\n[recipes.bolt]\nthreshold = 0.4\n"
    station = make_station({"top": [("bad", 0)], "side": [("good", 0)]}, recipes).start()
    original = station.config.read_text()
    station.ask("recipe.activate", camera="top", recipe="bolt")
    station.ask("recipe.activate", camera="side", recipe="bolt", table={"threshold": 0.7})
    own = {"id": "bolt", "version": 2}  # of side alone, never in the file
    station.config.write_text(original.replace("threshold = 0.4", "threshold = 0.5"))
    said = reload(station)
    assert (said["taken_up"], said["judged_from_now_on"]) == (["recipes.bolt.threshold"], {"top": "bolt@3"})
    assert station.status()["recipe"] == {"top": {"id": "bolt", "version": 3}, "side": own}
    assert station.ask("threshold.get", camera="top")["threshold"] == 0.5
    station.trigger("top", "A")
    assert station.until("verdict", 1)[0]["recipe"] == {"id": "bolt", "version": 3}
    station.kill()
    station.start()
    assert station.status()["recipe"] == {"top": {"id": "bolt", "version": 3}, "side": own}
    station.stop()
    station.config.write_text(original.replace("threshold = 0.4", "threshold = 0.6"))
    station.start()
    assert station.status()["recipe"] == {"top": {"id": "bolt", "version": 4}, "side": own}
    station.stop()


def test_a_wrong_file_leaves_everything_as_it_is(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]}, "[recipes.default]\nthreshold = 0.4\n").start()
    original = station.config.read_text()
    wrong = {
        "treshold = 0.6": "did you mean 'threshold'",
        "threshold = 7": "recipes.default.threshold",
        "threshold =": "not valid TOML",
        'threshold = 0.6\nobject = "refuse me"': "told to refuse",  # the worker's own word
    }
    for text, reason in wrong.items():
        masks = original.replace("[publish]\n", '[publish]\nmasks = "never"\n')
        station.config.write_text(masks.replace("threshold = 0.4", text))
        said = reload(station)
        assert (said["event"], reason in said["error"]) == ("reload_refused", True), said
    assert station.status()["recipe"] == {"top": {"id": "default", "version": 1}}
    station.config.unlink()
    assert str(station.config) in reload(station)["error"]
    station.trigger("top", "A")
    assert station.until("verdict", 1)[0]["recipe"] == {"id": "default", "version": 1}
    station.config.write_text(original)
    assert reload(station)["taken_up"] == []
    station.stop()


@pytest.mark.parametrize(
    ("key", "hot"),
    [
        ("recipes.default.prompt.kernel_size", True),
        ("cameras.top.recipe", True),
        ("publish.encoding", True),
        ("cameras", False),
        ("cameras.top.fps", False),
        ("publish.endpoint", False),
        ("model.bundle", False),
        ("station", False),
    ],
)
def test_which_keys_are_hot(key: str, hot: bool) -> None:
    assert _is_hot(key) is hot
