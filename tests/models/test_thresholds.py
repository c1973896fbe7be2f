"""Thresholds of a bundle from an auxiliary set: chosen as the method says, written where the product reads them."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundle import write_parts, write_tiny_bundle

from flawline.agent.cli_models import models
from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.bundle import read_bundle
from flawline.models.datasets import read_folders
from flawline.models.ground_truth import read_rgb
from flawline.models.inspector import Inspector
from flawline.models.metrics import rank_metrics
from flawline.models.thresholds import PixelCounts, best_decision


def test_s_a_is_cut_where_the_pooled_pixels_have_the_largest_f1() -> None:
    rng = np.random.default_rng(0)
    counts = PixelCounts()
    values, truths = [], []
    for _ in range(5):  # pictures of different sizes and of any values that a map has, both ends among them
        mask = rng.random((30, 40 + int(rng.integers(9)))) < 0.1
        noisy = np.clip(0.35 * mask + rng.normal(0.4, 0.15, mask.shape), 0.0, 1.0)
        plane = (np.round(noisy, 3)).astype(np.float32)
        counts.add(plane, mask)
        values.append(plane.ravel())
        truths.append(mask.ravel())
    pooled, wanted = np.concatenate(values), np.concatenate(truths)
    exact = rank_metrics(pooled[wanted], pooled[~wanted])
    threshold, f1 = counts.best()
    assert exact.f1_threshold is not None
    assert (threshold, f1) == pytest.approx((exact.f1_threshold, exact.f1_max), abs=1e-6)
    assert f1 == pytest.approx(
        2
        * (wanted & (pooled >= np.float32(threshold))).sum()
        / (wanted.sum() + (pooled >= np.float32(threshold)).sum())
    )


def test_the_decision_is_of_the_largest_balanced_accuracy_and_not_below_s_a() -> None:
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(0.4, 0.1, 60), rng.normal(0.6, 0.1, 20)])
    bad = np.arange(80) >= 60

    def balanced(threshold: float) -> float:
        return float(((scores >= threshold)[bad].mean() + (scores < threshold)[~bad].mean()) / 2)

    threshold, accuracy = best_decision(scores, bad, 0.0)
    assert accuracy == pytest.approx(balanced(threshold))
    assert accuracy == pytest.approx(max(balanced(float(one)) for one in scores))
    held, lower = best_decision(scores, bad, 0.7)
    assert held >= 0.7
    assert lower == pytest.approx(max(balanced(float(one)) for one in scores[scores >= 0.7]))
    assert best_decision(scores, bad, 2.0) == (threshold, accuracy)  # no score reaches it


def test_the_decision_lies_between_the_scores_that_it_parts() -> None:
    """Neither rounding nor the last bit of a score may turn a defect that was counted as found into a pass."""
    scores = np.array([0.2, 0.471, 0.63358, 0.8])
    assert best_decision(scores, scores > 0.5, 0.0) == (0.552, 1.0)
    assert best_decision(scores, scores > 0.5, 0.6) == (0.617, 1.0)
    close = np.array([0.5001, 0.5002])
    threshold, accuracy = best_decision(close, np.array([False, True]), 0.0)
    assert (0.5001 < threshold <= 0.5002, accuracy) == (True, 1.0)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(models, ["thresholds", *arguments, "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_they_are_written_into_the_bundle_and_hold_from_then_on(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    file = bundle / "bundle.toml"
    file.write_text("# ours\n" + file.read_text().replace("[thresholds]\nregion = 0.5\ndecision = 0.5\n", ""))
    before = read_bundle(bundle)
    assert not before.manifest.states_thresholds
    untold = Inspector.load(bundle, device="cpu")
    assert "nobody chose a threshold" in str(untold.prepare(Recipe()).warning)
    assert untold.prepare(Recipe(threshold=0.4)).warning is None
    auxiliary = write_parts(tmp_path / "aux", "plate", good=3, defective=4).parent
    arguments = (str(bundle), "--dataset", "folder", "--root", str(auxiliary), "--json")
    said = json.loads(run(*arguments, "--dry-run"))
    assert read_bundle(bundle).sha256 == before.sha256
    assert json.loads(run(*arguments)) == said | {"written": str(bundle)}
    text = file.read_text()
    assert text.startswith("# ours\n")
    after = read_bundle(bundle).manifest
    assert (after.thresholds.region, after.thresholds.decision) == (said["region"], said["decision"])
    assert after.thresholds.chosen_on == said["chosen_on"] == "folder aux: 7 pictures of 1 classes"
    assert after.files == before.manifest.files
    prepared = Inspector.load(bundle, device="cpu").prepare(Recipe())
    assert (prepared.region_threshold, prepared.threshold) == (said["region"], said["decision"])
    assert prepared.warning is None
    judging = Inspector.load(bundle, device="cpu")
    failed: dict[bool, list[bool]] = {False: [], True: []}
    for sample in read_folders(auxiliary)[0].test:
        result = judging.inspect(read_rgb(sample.image), Recipe(object="plate"))
        failed[sample.defective].append(result.score >= said["decision"])
    share = {kind: np.mean(judged) for kind, judged in failed.items()}
    assert (share[True] + 1 - share[False]) / 2 == pytest.approx(said["balanced_accuracy"])
    again = tomllib.loads(text)["thresholds"]
    assert again.keys() == {"region", "decision", "chosen_on"}


@pytest.mark.parametrize(("good", "defective"), [(3, 0), (0, 3)])
def test_parts_of_one_kind_choose_nothing(tmp_path: Path, good: int, defective: int) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    auxiliary = write_parts(tmp_path / "aux", good=good, defective=defective).parent
    with pytest.raises(ConfigError, match="good and defective parts"):
        run(str(bundle), "--dataset", "folder", "--root", str(auxiliary))


def test_the_shipped_bundle_is_not_written_to(tmp_path: Path) -> None:
    auxiliary = write_parts(tmp_path / "aux").parent
    with pytest.raises(ConfigError, match="comes with flawline"):
        run("demo", "--dataset", "folder", "--root", str(auxiliary))
