"""Segmentation and classification metrics of one class, exact over all distinct thresholds. No torch here.

Every metric is a function of three things per distinct positive score t, from high to low: how much positive
weight has a score of exactly t, and how many negatives lie strictly above t and at or above t. F1 and the
precision-recall steps can change for the better only where a positive is gained, so no other threshold is
needed, and the one large array is that of the negatives, sorted in place: 4e7 pixels cost 160 MB and no index.

The values are those of scikit-learn (`roc_auc_score`, `average_precision_score`, the largest F1 of
`precision_recall_curve`), ties included.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Reals = NDArray[np.float64]
Mask = NDArray[np.bool_]

FPR_LIMIT = 0.3


@dataclass(frozen=True)
class Curve:
    """What the distinct positive scores see, from the highest to the lowest."""

    score: Reals  # (n,) distinct, falling
    gained: Reals  # (n,) positive weight of exactly this score; sums to `positives`
    above: Reals  # (n,) negatives with a larger score
    at_or_above: Reals  # (n,) negatives with this score or a larger one
    positives: float
    negatives: float

    @property
    def true_positives(self) -> Reals:
        """(n,) positive weight with this score or a larger one."""
        return np.cumsum(self.gained)


def curve(positive: Scores, negative: Scores, weight: Reals | None = None) -> Curve | None:
    """The curve of (p,) positive and (q,) negative scores, or None where one of them is empty.

    `negative` is sorted in place. `weight` (p,) replaces the count of positives. Raises ValueError for scores
    that are not finite.
    """
    if len(positive) == 0 or len(negative) == 0:
        return None
    negative.sort()  # NaN sorts last
    if not (np.isfinite(negative[0]) and np.isfinite(negative[-1]) and np.isfinite(positive).all()):
        raise ValueError("scores must be finite numbers")
    gained: Reals
    if weight is None:
        distinct, count = np.unique(positive, return_counts=True)
        gained = count.astype(np.float64)
    else:
        distinct, inverse = np.unique(positive, return_inverse=True)
        gained = np.bincount(inverse, weights=weight, minlength=len(distinct)).astype(np.float64)
    below = np.searchsorted(negative, distinct, side="left")
    not_above = np.searchsorted(negative, distinct, side="right")
    total = len(negative)
    return Curve(
        score=distinct[::-1].astype(np.float64),
        gained=gained[::-1],
        above=(total - not_above)[::-1].astype(np.float64),
        at_or_above=(total - below)[::-1].astype(np.float64),
        positives=float(gained.sum()),
        negatives=float(total),
    )


def area_up_to(of: Curve, limit: float) -> float:
    """Area under the curve of positive weight over false positive rate, from 0 to `limit`, divided by `limit`.

    With limit 1 this is AUROC; with per-region weights (`region_weights`) and limit 0.3 it is AUPRO. A positive
    whose score ties with negatives is gained linearly while they are passed, which is the trapezoid rule.
    """
    start = of.above / of.negatives
    end = of.at_or_above / of.negatives
    reached = np.clip(limit, start, end)
    width = np.maximum(end - start, np.finfo(np.float64).tiny)
    ramp = (reached - start) ** 2 / (2 * width)
    area = ramp + np.maximum(limit - end, 0.0)
    return float((of.gained * area).sum() / of.positives / limit)


def average_precision(of: Curve) -> float:
    """Step sum of precision over recall, not the trapezoid of the curve."""
    gained = of.true_positives
    precision = gained / (gained + of.at_or_above)
    return float((of.gained * precision).sum() / of.positives)


def f1_max(of: Curve) -> tuple[float, float]:
    """The largest F1 over all distinct thresholds, and the threshold (score >= it is positive) that gives it."""
    gained = of.true_positives
    f1 = 2 * gained / (gained + of.at_or_above + of.positives)
    best = int(np.argmax(f1))
    return float(f1[best]), float(of.score[best])


@dataclass(frozen=True)
class RankMetrics:
    """AUROC, average precision and largest F1, each None where there are only positives or only negatives."""

    auroc: float | None = None
    ap: float | None = None
    f1_max: float | None = None
    f1_threshold: float | None = None
    curve: Curve | None = None


def rank_metrics(positive: Scores, negative: Scores) -> RankMetrics:
    """Metrics of (p,) positive and (q,) negative scores; `negative` is sorted in place."""
    of = curve(positive, negative)
    if of is None:
        return RankMetrics()
    best, threshold = f1_max(of)
    return RankMetrics(area_up_to(of, 1.0), average_precision(of), best, threshold, of)


@dataclass(frozen=True)
class PixelMetrics:
    """Pixel metrics of one class, all pixels of its images pooled; None where not defined.

    `aupro` is exact over all thresholds, FPR up to 0.3, interpolated at the limit. `aupro_200` follows the
    literature's scripts: 200 equally spaced thresholds, FPR below 0.3 stretched to [0, 1].
    """

    rank: RankMetrics
    aupro: float | None = None
    aupro_200: float | None = None
    regions: int = 0


def region_weights(mask: Mask) -> tuple[Reals, int]:
    """(m,) weight 1/area of its 8-connected region for each of the mask's m pixels in row order, and how many
    regions there are."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA].astype(np.float64)
    return 1.0 / area[labels[mask]], count - 1


def pixel_metrics(maps: Iterable[Scores], masks: Sequence[Mask]) -> PixelMetrics:
    """Metrics of n anomaly maps (H_i, W_i) against n masks of the same sizes.

    The maps are read once, in order, and need not be in memory together. Raises ValueError where a map and its
    mask differ in size.
    """
    pixels = sum(mask.size for mask in masks)
    defective = sum(int(mask.sum()) for mask in masks)
    positive = np.empty(defective, np.float32)
    negative = np.empty(pixels - defective, np.float32)
    weight = np.empty(defective, np.float64)
    p = n = regions = 0
    for number, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        if anomaly_map.shape != mask.shape:
            raise ValueError(f"map {number} is {anomaly_map.shape}, its mask {mask.shape}")
        inside = anomaly_map[mask]
        outside = anomaly_map[~mask]
        negative[n : n + len(outside)] = outside
        n += len(outside)
        if len(inside):
            positive[p : p + len(inside)] = inside
            weight[p : p + len(inside)], found = region_weights(mask)
            p += len(inside)
            regions += found
    rank = rank_metrics(positive, negative)
    if rank.curve is None:
        return PixelMetrics(rank, regions=regions)
    by_region = curve(positive, negative, weight)
    assert by_region is not None
    return PixelMetrics(
        rank, area_up_to(by_region, FPR_LIMIT), _aupro_200(by_region, positive, negative), regions=regions
    )


def _aupro_200(by_region: Curve, positive: Scores, negative: Scores) -> float | None:
    """AUPRO as the literature's scripts have it; None where fewer than two thresholds stay below the limit."""
    low = min(float(positive.min()), float(negative[0]))
    high = max(float(positive.max()), float(negative[-1]))
    if high <= low:
        return None
    threshold = low + np.arange(200) * ((high - low) / 200)
    rate = (len(negative) - np.searchsorted(negative, threshold, side="right")) / len(negative)
    rising = by_region.score[::-1]
    reached = np.concatenate([[0.0], np.cumsum(by_region.gained)])  # weight of the k highest scores
    overlap = reached[len(rising) - np.searchsorted(rising, threshold, side="right")] / by_region.positives
    kept = rate < FPR_LIMIT
    rate, overlap = rate[kept], overlap[kept]
    if len(rate) < 2 or rate.max() <= rate.min():
        return None
    rate = (rate - rate.min()) / (rate.max() - rate.min())
    return float(np.trapezoid(overlap[::-1], rate[::-1]))
