"""The threshold keeps its promise on parts that it has not seen, and too few parts are refused."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta

from flawline.config.errors import ConfigError
from flawline.config.recipe_file import update_recipe
from flawline.config.sources import load_settings
from flawline.models.calibrate import allowed_rejects, calibrate, clopper_pearson_upper, samples_needed


@pytest.mark.parametrize(("count", "target", "confidence"), [(59, 0.05, 0.95), (400, 0.02, 0.9), (20000, 0.01, 0.95)])
def test_as_many_may_be_rejected_as_the_limit_allows(count: int, target: float, confidence: float) -> None:
    rejected = allowed_rejects(count, target, confidence)
    assert beta.ppf(confidence, rejected + 1, count - rejected) <= target
    assert beta.ppf(confidence, rejected + 2, count - rejected - 1) > target


@pytest.mark.parametrize(("k", "n", "confidence"), [(0, 59, 0.95), (3, 200, 0.95), (10, 1000, 0.9), (50, 60, 0.99)])
def test_the_upper_limit_is_clopper_pearsons(k: int, n: int, confidence: float) -> None:
    assert clopper_pearson_upper(k, n, confidence) == pytest.approx(beta.ppf(confidence, k + 1, n - k), abs=1e-9)


def test_wilks_numbers_are_needed() -> None:
    assert samples_needed(0.05, 0.95) == 59
    assert samples_needed(0.01, 0.95) == 299
    assert samples_needed(0.005, 0.95) == 598


def test_the_bound_holds_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(300):
        found = calibrate(list(rng.random(400)), 0.02, 0.9)
        true_rate = 1.0 - found.threshold  # scores are uniform
        kept += true_rate <= 0.02
        assert found.false_reject_bound <= 0.02
        assert found.rejected > 0  # 400 parts allow some rejects, a threshold above all would be wasteful
    assert kept >= 0.87 * 300


def test_the_threshold_passes_the_part_it_rests_on_even_among_ties() -> None:
    scores = [0.25] * 50 + [0.5] * 20
    found = calibrate(scores, 0.05, 0.95)
    assert np.float32(0.5) < found.threshold < 0.5001
    assert found.rejected == 0


def test_too_few_parts_are_refused_with_the_number_needed() -> None:
    with pytest.raises(ConfigError, match=r"58 parts.*59 are needed"):
        calibrate([0.1] * 58, 0.05, 0.95)
    with pytest.raises(ConfigError, match=r"--good: .*score of 1\.0"):
        calibrate([1.0] * 100, 0.05, 0.95)
    with pytest.raises(ConfigError, match=r"--last: .*score of 1\.0"):
        calibrate([1.0] * 100, 0.05, 0.95, "--last")


def test_the_recipe_is_written_back_with_its_comments(tmp_path: Path) -> None:
    file = tmp_path / "line.toml"
    file.write_text('# our line\nstation = "a"\n\n[recipes.default]\nobject = "plate"  # word\nthreshold = 0.5\n')
    values = {
        "date": "2026-01-01T00:00:00+00:00",
        "count": 299,
        "rejected": 0,
        "target_fpr": 0.01,
        "confidence": 0.95,
        "false_reject_bound": 0.00997,
        "method": "m",
        "threshold": 0.61,
        "bundle": "demo",
        "bundle_sha256": "0" * 64,
    }
    update_recipe(file, "default", {"threshold": 0.61, "calibration": values})
    update_recipe(file, "other", {"threshold": 0.4})
    text = file.read_text()
    assert "# our line" in text
    assert 'object = "plate"  # word' in text
    recipes = load_settings(file, environ={}).recipes
    assert recipes["default"].threshold == 0.61
    assert recipes["default"].calibration is not None
    assert recipes["default"].calibration.count == 299
    assert recipes["other"].threshold == 0.4
    before = file.read_text()
    with pytest.raises(ConfigError, match="threshold"):
        update_recipe(file, "default", {"threshold": 7.0})
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["line.toml"]
