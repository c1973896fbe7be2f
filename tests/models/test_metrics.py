"""Metrics are scikit-learn's, and AUPRO is what its definition gives threshold by threshold."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from flawline.models.metrics import pixel_metrics, rank_metrics, region_weights


def score_maps(kind: str, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Some maps and masks of different sizes: random scores, scores with many ties, or one constant score."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for height, width in ((20, 30), (31, 17), (25, 25)):
        mask = np.zeros((height, width), bool)
        mask[3:9, 4:8] = True
        mask[12:14, 10:16] = rng.random() < 0.7
        scores = rng.random((height, width)) + 0.3 * mask
        if kind == "tied":
            scores = np.round(scores * 6) / 6
        if kind == "constant":
            scores = np.full((height, width), 0.25)
        maps.append(scores.astype(np.float32))
        masks.append(mask)
    return maps, masks


@pytest.mark.parametrize("kind", ["random", "tied", "constant"])
@pytest.mark.parametrize("seed", range(3))
def test_pixel_metrics_equal_scikit_learn(kind: str, seed: int) -> None:
    maps, masks = score_maps(kind, seed)
    scores = np.concatenate([m.ravel() for m in maps])
    labels = np.concatenate([m.ravel() for m in masks])
    precision, recall, _ = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):
        f1 = 2 * precision * recall / (precision + recall)
    ours = pixel_metrics(maps, masks)
    assert ours.rank.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert ours.rank.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert ours.rank.f1_max == pytest.approx(np.nanmax(f1), abs=1e-9)
    threshold = ours.rank.f1_threshold
    assert threshold is not None
    chosen = scores >= threshold
    hits = (chosen & labels).sum()
    assert 2 * hits / (chosen.sum() + labels.sum()) == pytest.approx(ours.rank.f1_max, abs=1e-9)


@pytest.mark.parametrize("kind", ["random", "tied", "constant"])
def test_aupro_is_the_area_under_the_mean_overlap_of_regions(kind: str) -> None:
    maps, masks = score_maps(kind, 5)
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        regions.append(scores[3:9, 4:8])
        if mask[12, 10]:
            regions.append(scores[12:14, 10:16])
    good = np.concatenate([scores[~mask] for scores, mask in zip(maps, masks, strict=True)])
    rate, overlap = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        rate.append(float((good >= threshold).mean()))
        overlap.append(float(np.mean([(region >= threshold).mean() for region in regions])))
    area = 0.0
    for i in range(1, len(rate)):
        a, b = rate[i - 1], rate[i]
        if a >= 0.3 or a == b:
            continue
        end = min(b, 0.3)
        at_end = overlap[i - 1] + (overlap[i] - overlap[i - 1]) * (end - a) / (b - a)
        area += (end - a) * (overlap[i - 1] + at_end) / 2
    ours = pixel_metrics(maps, masks)
    assert ours.regions == len(regions)
    assert ours.aupro == pytest.approx(area / 0.3, abs=1e-9)


def test_aupro_200_follows_the_scripts_of_the_literature() -> None:
    maps, masks = score_maps("random", 6)
    everything = np.concatenate([m.ravel() for m in maps])
    low, high = float(everything.min()), float(everything.max())
    good = np.concatenate([scores[~mask] for scores, mask in zip(maps, masks, strict=True)])
    rates, overlaps = [], []
    for step in range(200):
        threshold = low + step * (high - low) / 200
        overlap = []
        for scores, mask in zip(maps, masks, strict=True):
            overlap.append((scores[3:9, 4:8] > threshold).mean())
            if mask[12, 10]:
                overlap.append((scores[12:14, 10:16] > threshold).mean())
        rates.append((good > threshold).mean())
        overlaps.append(np.mean(overlap))
    rate, overlap_of = np.array(rates), np.array(overlaps)
    kept = rate < 0.3
    rate, overlap_of = rate[kept], overlap_of[kept]
    rate = (rate - rate.min()) / (rate.max() - rate.min())
    assert pixel_metrics(maps, masks).aupro_200 == pytest.approx(np.trapezoid(overlap_of[::-1], rate[::-1]), abs=1e-6)


def test_diagonal_pixels_are_one_region_and_weigh_by_its_area() -> None:
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[1, 1] = True
    mask[4, 0:4] = True
    weights, count = region_weights(mask)
    assert count == 2
    assert weights.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_what_is_not_defined_is_none() -> None:
    scores = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    for mask in (np.zeros((4, 4), bool), np.ones((4, 4), bool)):
        metrics = pixel_metrics([scores], [mask])
        assert metrics.rank.auroc is None
        assert metrics.rank.ap is None
        assert metrics.rank.f1_max is None
        assert metrics.aupro is None
    assert rank_metrics(np.empty(0, np.float32), scores.ravel()).auroc is None


def test_scores_that_are_no_numbers_are_refused() -> None:
    for where in ("positive", "negative"):
        positive, negative = np.array([0.5, 0.6], np.float32), np.array([0.1, 0.2], np.float32)
        (positive if where == "positive" else negative)[0] = np.nan
        with pytest.raises(ValueError, match="finite"):
            rank_metrics(positive, negative)
