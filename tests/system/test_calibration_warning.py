"""A threshold that was calibrated with other models or arithmetic: verdicts, results, the log and the doctor say it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from station import CLI, free_port

from flawline.agent.cli_inspect import inspect
from flawline.camera.simulated import SimulatedCamera
from flawline.config.recipe import Precision, Recipe
from flawline.config.settings_camera import CameraSettings
from flawline.models.bundle import open_bundle
from flawline.models.overlay import encode

OTHER = "0" * 64
EVENT = "calibration_does_not_hold"


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """Two cameras of the simulated line: the recipe of one was calibrated with the demo bundle, the other's not.

    No camera has the recipe `half`, which was calibrated with demo at bf16; `fits` was at the fp32 of a CPU.
    """
    own = open_bundle("demo").sha256
    text = ""
    for name, sha256, precision in (("fits", own, "fp32"), ("stale", OTHER, "fp32"), ("half", own, "bf16")):
        if name != "half":
            text += f'[[cameras]]\nname = "{name}"\nfps = 1.0\nrecipe = "{name}"\n'
        text += f"[recipes.{name}]\nthreshold = 0.5\n[recipes.{name}.calibration]\n"
        text += 'date = "2026-01-02T03:04:05+00:00"\ncount = 299\nrejected = 0\nmethod = "order statistic"\n'
        text += "target_fpr = 0.01\nconfidence = 0.95\nfalse_reject_bound = 0.01\nthreshold = 0.5\n"
        text += f'bundle = "demo"\nbundle_sha256 = "{sha256}"\nprecision = "{precision}"\n'
    text += f'[publish]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n'
    text += f'[control]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n'
    text += f'[preview]\nport = {free_port()}\n[journal]\npath = "state"\nmin_free_mb = 1\narchive_mb = 1\n'
    text += '[model]\nbundle = "demo"\ndevice = "cpu"\nthreads = 1\n'
    file = tmp_path / "line.toml"
    file.write_text(text)
    return file


def test_verdicts_carry_it_and_the_log_says_it_once(line: Path) -> None:
    endpoint = line.read_text().partition('endpoint = "')[2].partition('"')[0]
    subscribe = [*CLI, "subscribe", "--endpoint", endpoint, "--count", "6", "--json"]
    with subprocess.Popen(subscribe, stdout=subprocess.PIPE, text=True) as receiver:
        done = subprocess.run(
            [*CLI, "run", "--config", str(line), "--frames", "8"], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        verdicts = [json.loads(row) for row in receiver.communicate(timeout=60)[0].splitlines()]
    judged = {
        name: [v for v in verdicts if v["camera"] == name and v["result"] != "error"] for name in ("fits", "stale")
    }
    assert judged["fits"]
    assert judged["stale"]
    assert {verdict["warning"] for verdict in judged["fits"]} == {None}
    for verdict in judged["stale"]:
        assert f"calibrated with bundle demo ({OTHER[:12]})" in verdict["warning"]
        assert f"demo ({verdict['provenance']['bundle_sha256'][:12]}) judges" in verdict["warning"]
    said = [json.loads(row) for row in done.stderr.splitlines() if EVENT in row]
    assert [(row["level"], row["recipe"]) for row in said] == [("warning", "stale@1")]


def test_one_shot_results_carry_it(line: Path) -> None:
    picture = line.parent / "part.png"
    picture.write_bytes(encode(SimulatedCamera(CameraSettings(name="top")).part(0).image))
    said: dict[str, Any] = {}
    for recipe in ("fits", "stale", "half"):
        arguments = [str(picture), "--config", str(line), "--recipe", recipe, "--json"]
        done = CliRunner().invoke(inspect, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        record = json.loads(done.stdout)
        said[recipe] = record["warning"]
        assert record["provenance"]["precision"] == "float32"
        assert ("warning: " in done.stderr) == (recipe != "fits")
    assert said["fits"] is None
    assert OTHER[:12] in said["stale"]
    assert "calibrated at bf16, now the models judge at fp32" in said["half"]


def test_the_doctor_says_it_with_its_remedy(line: Path) -> None:
    done = subprocess.run(
        [*CLI, "doctor", "--config", str(line), "--json"], capture_output=True, text=True, timeout=280
    )
    found = [finding for finding in json.loads(done.stdout)["findings"] if finding["check"] == "calibration"]
    assert [finding["verdict"] for finding in found] == ["ok", "warning", "warning"]
    assert "recipe stale" in found[1]["found"]
    assert "flawline calibrate --recipe stale" in found[1]["remedy"]
    assert "recipe half: the threshold was calibrated at bf16" in found[2]["found"]


def test_it_holds_for_the_scale_that_it_was_made_on() -> None:
    made = {"date": "2026-01-02", "count": 299, "rejected": 0, "method": "order statistic", "target_fpr": 0.01}
    made |= {"confidence": 0.95, "false_reject_bound": 0.01, "threshold": 0.5, "bundle": "demo", "bundle_sha256": OTHER}
    recipe = Recipe(object="screw", threshold=0.5)
    noted = made | {"recipe_sha256": recipe.scale_sha256(), "memory_sha256": "a" * 64}
    recipe = Recipe.model_validate(recipe.model_dump() | {"calibration": noted})

    def said(memory: str | None = "a" * 64, precision: Precision | None = "fp32", **keys: Any) -> str | None:
        return recipe.model_copy(update=keys).calibration_warning("demo", OTHER, memory, precision)

    assert said() is None
    assert said(threshold=0.6, deadline_ms=100, min_defect_area_px=50) is None
    for changed in ({"object": "bolt"}, {"roi": (0, 0, 9, 9)}, {"memory_share": 0.5}, {"ignore": ((0, 0, 9, 9),)}):
        assert "were changed" in (said(**changed) or "")
    assert "calibrated with memory aaaaaaaaaaaa, now the recipe has memory bbbbbbbbbbbb" in (said("b" * 64) or "")
    assert "now the recipe has no memory" in (said(None) or "")
    assert "calibrated as 0.500000, the recipe has 0.4" in (said(threshold=0.4) or "")
    recipe = Recipe.model_validate(recipe.model_dump() | {"calibration": noted | {"min_defect_area_px": 20}})
    assert said() is None
    assert said(min_defect_area_px=21) is None, "scores only fall"
    assert "calibrated with min_defect_area_px = 20, the recipe has 19" in (said(min_defect_area_px=19) or "")
    recipe = Recipe.model_validate(recipe.model_dump() | {"calibration": noted | {"precision": "fp32"}})
    assert said() is None
    assert said(precision=None) is None, "nobody knows"
    assert "calibrated at fp32, now the models judge at bf16" in (said(precision="bf16") or "")
    older = Recipe.model_validate(recipe.model_dump() | {"calibration": made})
    assert older.calibration_warning("demo", OTHER, "b" * 64, "bf16") is None, "nothing was noted then"
