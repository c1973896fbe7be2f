"""Learning on the running line, with the real engine and a small bundle: the memory, its hash, the way back."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from station import CLI, Make, Station
from tiny_bundle import write_tiny_bundle

from flawline.config.memory_versions import stored_sha256


def write_part(path: Path, number: int, *, scratched: bool = False) -> None:
    picture = np.random.default_rng(number).normal(120, 6, (64, 64, 3))
    if scratched:
        picture[8:24, 44:60] = (255, 0, 0)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_next_parts_are_learnt_and_judged_by(make_station: Make, tmp_path: Path) -> None:
    station: Station = make_station({"top": [("good", 0)] * 9})
    parts = station.folder / "top"
    for number, path in enumerate(sorted(parts.iterdir())):
        write_part(path, number, scratched=number == 2)
    bundle = write_tiny_bundle(tmp_path / "tiny")
    engine = "worker.engine=flawline.models.collaboration:CollaborationEngine"
    models = ("--set", f"model.bundle={os.fspath(bundle)}", "--set", "model.threads=1")
    station.start("--set", engine, *models, limit_s=400)

    with pytest.raises(ValueError, match=r"learn\.start first"):
        station.ask("learn.commit")
    with pytest.raises(ValueError, match="there is no 'side'"):
        station.ask("learn.start", camera="side", count=2)
    assert station.ask("learn.start", camera="top", count=7)["state"] == "collecting"
    with pytest.raises(ValueError, match="is learning"):
        station.ask("learn.start", camera="top", count=2)
    station.trigger("top", *(f"learn {number}" for number in range(8)))
    before: list[dict[str, Any]] = station.until("verdict", 8, limit_s=120)
    station.wait_for(lambda: station.ask("learn.status")["state"] == "ready", 120)
    assert station.ask("learn.status")["collected"] == 7  # the eighth part is not one of those asked for

    made = station.ask("learn.commit")
    assert [one["name"] for one in made["pictures"] if one["use"] == "outlier"] == [
        f"top frame {before[2]['frame_id']}"
    ]
    assert made["memory_sha256"] == stored_sha256(Path(made["memory"]))
    assert 0 <= made["by_words"] <= 6  # of those that were learnt
    assert made["lie_alike"] is True
    assert station.ask("learn.status") == {"id": 1, "ok": True, "state": "idle"}
    station.trigger("top", "after")
    after = station.until("verdict", 9, limit_s=120)[-1]
    assert after["provenance"]["memory_sha256"] == made["memory_sha256"]
    assert all(verdict["provenance"]["memory_sha256"] is None for verdict in before)
    assert after["recipe"] == made["recipe"]

    back = made["before"]
    station.ask("recipe.activate", recipe=back["id"], version=back["version"])
    station.trigger("top", "back")
    assert station.until("verdict", 10, limit_s=120)[-1]["provenance"]["memory_sha256"] is None
    station.ask("learn.start", camera="top", count=3)
    assert station.ask("learn.discard")["state"] == "idle"
    station.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_reject_marked_on_the_line_passes_after_one_command_and_a_reload(make_station: Make, tmp_path: Path) -> None:
    station: Station = make_station({"top": [("good", 0)] * 4})
    bundle = write_tiny_bundle(tmp_path / "tiny")
    good = tmp_path / "good"
    good.mkdir()
    for number in range(6):
        write_part(good / f"{number}.png", number)
    for number, path in enumerate(sorted((station.folder / "top").iterdir())):
        write_part(path, 10 + number % 2, scratched=number % 2 == 0)  # the red patch is the maker's mark

    def learn(*options: str) -> dict[str, Any]:
        command = [*CLI, "learn", "--config", str(station.config), "--bundle", str(bundle), "--device", "cpu", "--json"]
        done = subprocess.run([*command, *options], capture_output=True, timeout=400, check=True)
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    first = learn("--good", str(good))
    models = ("--set", f"model.bundle={os.fspath(bundle)}", "--set", "model.threads=1")
    engine = "worker.engine=flawline.models.collaboration:CollaborationEngine"
    station.start("--set", engine, "--set", "journal.archive_format=png", *models, limit_s=400)
    station.trigger("top", "marked", "plain")
    before = station.until("verdict", 2, limit_s=120)
    assert [verdict["result"] for verdict in before] == ["fail", "pass"]
    assert {verdict["provenance"]["memory_sha256"] for verdict in before} == {first["memory_sha256"]}
    marked = str(before[0]["seq"])
    feedback = [*CLI, "feedback", "--endpoint", station.control, "--who", "anna", "--note", "the maker's mark"]
    subprocess.run([*feedback, marked, "--good"], timeout=120, check=True)
    unknown = subprocess.run([*feedback, "99", "--bad"], capture_output=True, timeout=120, check=False)
    assert (unknown.returncode, b"no verdict 99" in unknown.stderr) == (1, True)
    pictures = station.folder / "state" / "line1" / "pictures"
    station.wait_for(lambda: list(pictures.glob("*/*-fail.png")), 60)

    made = learn("--from-feedback", "--activate")
    assert [(one["seq"], one["who"], one["use"]) for one in made["marked"]] == [(before[0]["seq"], "anna", "learnt")]
    assert made["activated"]
    assert station.process is not None
    station.process.send_signal(signal.SIGHUP)
    version = before[0]["recipe"]["version"]
    station.wait_for(lambda: station.status()["recipe"]["top"]["version"] > version, 120)
    station.trigger("top", "marked again")
    after = station.until("verdict", 3, limit_s=120)[-1]
    assert (after["result"], after["provenance"]["memory_sha256"]) == ("pass", made["memory_sha256"])
    station.stop()
