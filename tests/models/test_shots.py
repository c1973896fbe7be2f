"""`evaluate --shots`: what is written is what a memory of so many good parts gives, with honest intervals."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sklearn.metrics import roc_auc_score
from tiny_bundle import write_parts, write_tiny_bundle

from flawline.agent.cli_workbench import evaluate
from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.evaluate import Evaluation
from flawline.models.ground_truth import read_mask, read_rgb
from flawline.models.inspector import Inspector
from flawline.models.memory_learn import Learner
from flawline.models.shots import EDGE, ShotStudy

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shots")
    write_tiny_bundle(folder / "bundle", region=0.4)
    plate = write_parts(folder / "data", "plate", good=4, defective=4)
    more = write_parts(folder / "more", "plate", good=5, defective=0, seed=9)
    shutil.copytree(more / "test" / "good", plate / "train" / "good")
    write_parts(folder / "data", "without", good=2, defective=2, seed=4)
    return folder


def command(place: Path, out: Path, *more: str) -> Result:
    arguments = ["--dataset", "folder", "--root", str(place / "data"), "--bundle", str(place / "bundle")]
    arguments += ["--size", "64", "--device", "cpu", "--out", str(out), *more]
    return CliRunner().invoke(evaluate, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    done = command(place, place / "out", "--shots", "0,2,4,16", "--seeds", "2")
    assert done.exit_code == 0
    assert "plate: has 5 good pictures" in done.stderr
    assert "without: has no good pictures to learn from" in done.stderr
    return place / "out"


def content(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def test_every_number_of_good_parts_has_its_line_and_its_draws(out: Path) -> None:
    results = content(out)
    assert set(results["sets"]) == {"plate", "without"}  # the agent's own numbers stand there as ever
    shots = results["shots"]
    assert set(shots["sets"]) == {"plate"}
    assert shots["without_good"] == ["without"]
    lines = shots["sets"]["plate"]["lines"]
    # of 0 and of all five there is only one choice
    assert [(line["good_parts"], line["draws"]) for line in lines] == [(0, 1), (2, 2), (4, 2), (5, 1)]
    assert set(lines[0]["pixel_auroc"]) == {"words"}
    assert lines[0]["pixel_auroc_gain"] is None
    for line in lines[1:]:
        for metric in ("pixel_auroc", "image_auroc"):
            for name in ("words", "memory", "both"):
                low, high = line[f"{metric}_ci95"][name]
                assert 0.0 <= low <= high <= 1.0
                assert line[metric][name] == pytest.approx(np.mean([run[metric][name] for run in line["runs"]]))
            gain = line[f"{metric}_gain"]
            assert gain["value"] == pytest.approx(line[metric]["both"] - line[metric][gain["over"]])
            assert gain["ci95"][0] <= gain["ci95"][1]
    assert lines[1]["runs"][0] != lines[1]["runs"][1]
    cost = shots["sets"]["plate"]["cost"]
    assert cost["share"] == pytest.approx(cost["memory_ms"] / cost["clip_ms"])


def test_the_numbers_are_those_of_the_product_that_learnt_all_good_parts(place: Path, out: Path) -> None:
    """Judged anew, by the inspector itself with a memory in its recipe."""
    from flawline.models.memory_file import write_memory

    recipe = Recipe(object="plate")
    inspector = Inspector.load(place / "bundle", device="cpu")

    def picture(path: Path) -> Any:
        return cv2.resize(read_rgb(path), (64, 64), interpolation=cv2.INTER_AREA)

    learner = Learner(inspector, "plate", recipe)
    for path in (place / "data" / "plate" / "train" / "good").iterdir():
        learner.add(picture(path), path.name)
    write_memory(place / "m.safetensors", learner.learn().memory)
    fused = recipe.model_copy(update={"memory": str(place / "m.safetensors")})
    values, labels, scores, defective = [], [], [], []
    for path in sorted((place / "data" / "plate" / "test").glob("*/*.png")):
        clip_map = torch.from_numpy(inspector.trace(picture(path), fused).clip_map)
        large = torch.nn.functional.interpolate(
            clip_map[None, None], (EDGE, EDGE), mode="bilinear", align_corners=False
        )[0, 0].numpy()
        bad = path.parent.name != "good"
        truth = place / "data" / "plate" / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        labels.append(read_mask(truth, (EDGE, EDGE)) if bad else np.zeros((EDGE, EDGE), bool))
        values.append(large)
        scores.append(large.max())
        defective.append(bad)
    line = content(out)["shots"]["sets"]["plate"]["lines"][-1]
    expected = roc_auc_score(np.stack(labels).ravel(), np.stack(values).ravel())
    assert line["pixel_auroc"]["both"] == pytest.approx(expected, abs=2e-3)  # maps are kept in half precision
    assert line["image_auroc"]["both"] == pytest.approx(roc_auc_score(defective, scores), abs=0.07)


def test_the_table_and_the_curve_are_written(out: Path) -> None:
    text = (out / "results.md").read_text()
    assert "## With a few good parts" in text
    assert sum(line.startswith("| plate |") for line in text.split("## With a few good parts")[1].splitlines()) == 4
    assert "* without: left out, it has no good pictures to learn from" in text
    assert (out / "plots" / "shots.png").stat().st_size > 5000


def test_a_recipe_that_does_not_judge_whole_frames_is_refused(place: Path, tmp_path: Path) -> None:
    line = tmp_path / "line.toml"
    line.write_text("[recipes.default]\nroi = [0, 0, 32, 32]\n")
    with pytest.raises(ConfigError, match="--shots: judges whole frames"):
        command(place, tmp_path / "out", "--shots", "1", "--config", str(line))
    assert command(place, tmp_path / "out", "--shots", "1,many").exit_code == 2


def test_an_interrupted_study_goes_on_with_the_classes_that_are_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    asked = ("--shots", "0,2", "--seeds", "1", "--category", "plate")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "run", interrupted)  # after the study, which stands first
        assert command(place, tmp_path / "out", *asked).exit_code != 0
    whole = content(tmp_path / "other") if command(place, tmp_path / "other", *asked).exit_code == 0 else {}
    with monkeypatch.context() as patch:
        patch.setattr(ShotStudy, "_study", interrupted)
        assert command(place, tmp_path / "out", *asked).exit_code == 0
        going_on = content(tmp_path / "out")["shots"]["sets"]["plate"]["lines"]
        assert going_on == whole["shots"]["sets"]["plate"]["lines"]
        assert not (tmp_path / "out" / ".work").exists()
        assert command(place, tmp_path / "out", *asked).exit_code != 0  # finished: nothing to go on from
