"""Intervals over images: they hold the truth as often as they say, and their bins say what the pixels say."""

import numpy as np
import pytest

from flawline.models.bootstrap import Tally, bin_edges, binned_metrics, image_intervals, intervals
from flawline.models.metrics import pixel_metrics, rank_metrics


def some_images(count: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for number in range(count):
        mask = np.zeros((40, 40), bool)
        if number % 3:
            mask[5 : 12 + number % 4, 6:15] = True
        maps.append((rng.random((40, 40)) * 0.8 + (0.2 + 0.2 * rng.random()) * mask).astype(np.float32))
        masks.append(mask)
    return maps, masks


def test_binned_metrics_are_near_the_exact_ones() -> None:
    maps, masks = some_images(12, 0)
    scores, labels = np.stack(maps), np.stack(masks)
    tally = Tally(bin_edges(np.sort(scores[labels]), np.sort(scores[~labels])))
    for anomaly_map, mask in zip(maps, masks, strict=True):
        tally.add(anomaly_map, mask)
    binned = binned_metrics(tally.tallies(), np.ones((1, 12)))
    exact = pixel_metrics(maps, masks)
    assert binned["auroc"][0] == pytest.approx(exact.rank.auroc, abs=2e-3)
    assert binned["ap"][0] == pytest.approx(exact.rank.ap, abs=5e-3)
    assert binned["f1_max"][0] == pytest.approx(exact.rank.f1_max, abs=5e-3)
    assert binned["aupro"][0] == pytest.approx(exact.aupro, abs=5e-3)


def test_intervals_hold_the_metric_and_narrow_with_more_images() -> None:
    widths = []
    for count in (9, 90):
        maps, masks = some_images(count, 1)
        scores, labels = np.stack(maps), np.stack(masks)
        tally = Tally(bin_edges(np.sort(scores[labels]), np.sort(scores[~labels])))
        for anomaly_map, mask in zip(maps, masks, strict=True):
            tally.add(anomaly_map, mask)
        exact = pixel_metrics(maps, masks)
        found = intervals(tally.tallies(), {"auroc": exact.rank.auroc, "aupro": exact.aupro})
        for name, value in (("auroc", exact.rank.auroc), ("aupro", exact.aupro)):
            assert value is not None
            assert found[name][0] <= value <= found[name][1]
        widths.append(found["auroc"][1] - found["auroc"][0])
    assert widths[1] < widths[0] / 2


def test_image_intervals_hold_the_truth_in_most_draws() -> None:
    """Scores of two normal distributions one standard deviation apart have an AUROC of 0.760."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(60):
        defective = np.arange(80) < 40
        scores = rng.normal(size=80) + defective
        exact = rank_metrics(scores[defective].astype(np.float32), scores[~defective].astype(np.float32))
        low, high = image_intervals(scores, defective, {"auroc": exact.auroc})["auroc"]
        held += low <= 0.760 <= high
    assert held >= 50  # 57 of 60 are expected


def test_one_image_has_no_interval() -> None:
    assert image_intervals(np.array([0.5]), np.array([True]), {"auroc": None}) == {}


def test_few_images_of_a_kind_have_no_interval() -> None:
    """The same one good picture in every resample would look certain."""
    scores = np.linspace(0.0, 1.0, 26)
    assert image_intervals(scores, np.arange(26) > 0, {"auroc": 1.0}) == {}
    assert "auroc" in image_intervals(scores, np.arange(26) > 4, {"auroc": 1.0})
