"""All metrics of one class and one row, from its maps on disk: numbers, intervals, and curves for the plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawline.models.bootstrap import Tally, bin_edges, image_intervals, intervals
from flawline.models.datasets import Category
from flawline.models.map_store import MapStore
from flawline.models.metrics import Curve, Mask, PixelMetrics, RankMetrics, pixel_metrics, rank_metrics

METRICS = ("pixel_auroc", "pixel_f1_max", "pixel_ap", "aupro", "image_auroc", "image_ap", "image_f1_max")
CURVE_POINTS = 400


@dataclass(frozen=True)
class ClassTruth:
    """What is known of the pictures of one class: which are defective, and the masks of those whose pixels are."""

    defective: NDArray[np.bool_]  # (n,)
    with_pixels: list[int]  # numbers of the pictures that `masks` belongs to
    masks: list[Mask]

    @classmethod
    def of(cls, category: Category, masks: Sequence[Mask | None]) -> "ClassTruth":
        """`masks`: one per picture; all False for a good one, None where its pixels are not known."""
        known = [number for number, mask in enumerate(masks) if mask is not None] if category.with_masks else []
        defective = np.array([sample.defective for sample in category.test], bool)
        return cls(defective, known, [mask for number in known if (mask := masks[number]) is not None])


def class_report(store: MapStore, key: str, truth: ClassTruth, *, seed: int = 0) -> dict[str, Any]:
    """The row's entry in results.json for this class, with `curves` and `image_scores` for the plots."""
    scores = np.array(store.scores(key), np.float64)
    images = rank_metrics(scores[truth.defective].astype(np.float32), scores[~truth.defective].astype(np.float32))
    pixels = PixelMetrics(RankMetrics())
    ci: dict[str, Any] = {}
    if truth.masks:
        pixels = pixel_metrics(store.maps(key, truth.with_pixels), truth.masks)
        ci |= {
            {"auroc": "pixel_auroc", "ap": "pixel_ap", "f1_max": "pixel_f1_max"}.get(name, name): list(bounds)
            for name, bounds in _pixel_intervals(store, key, truth, pixels, seed).items()
        }
    if len(scores) > 1:
        found = image_intervals(scores, truth.defective, _of_rank(images))
        ci |= {f"image_{name}": list(bounds) for name, bounds in found.items()}
    return {
        "pixel_auroc": pixels.rank.auroc,
        "pixel_f1_max": pixels.rank.f1_max,
        "pixel_ap": pixels.rank.ap,
        "aupro": pixels.aupro,
        "image_auroc": images.auroc,
        "image_ap": images.ap,
        "image_f1_max": images.f1_max,
        "n_images": len(scores),
        "n_defective": int(truth.defective.sum()),
        "n_with_masks": len(truth.masks),
        "n_regions": pixels.regions,
        "aupro_200": pixels.aupro_200,
        "pixel_threshold": pixels.rank.f1_threshold,
        "image_threshold": images.f1_threshold,
        "ci95": ci,
        "stage_ms": store.stage_ms(key),
        "curves": {"pixel": _points(pixels.rank.curve), "image": _points(images.curve)},
        "image_scores": {
            "good": scores[~truth.defective].tolist(),
            "defective": scores[truth.defective].tolist(),
        },
    }


def _of_rank(metrics: RankMetrics) -> dict[str, float | None]:
    return {"auroc": metrics.auroc, "ap": metrics.ap, "f1_max": metrics.f1_max}


def _pixel_intervals(
    store: MapStore, key: str, truth: ClassTruth, exact: PixelMetrics, seed: int
) -> dict[str, tuple[float, float]]:
    if exact.rank.curve is None:
        return {}
    sample_positive, sample_negative = [], []
    for anomaly_map, mask in zip(store.maps(key, truth.with_pixels), truth.masks, strict=True):
        sample_positive.append(anomaly_map[mask])
        sample_negative.append(np.sort(anomaly_map[~mask])[::-1][:: max(1, mask.size // 4096)])
    positive, negative = np.sort(np.concatenate(sample_positive)), np.sort(np.concatenate(sample_negative))
    tally = Tally(bin_edges(positive, negative))
    for anomaly_map, mask in zip(store.maps(key, truth.with_pixels), truth.masks, strict=True):
        tally.add(anomaly_map, mask)
    return intervals(tally.tallies(), _of_rank(exact.rank) | {"aupro": exact.aupro}, seed=seed)


def _points(of: Curve | None) -> dict[str, list[float]] | None:
    """At most 400 points of the ROC and precision-recall curves, from the highest threshold to the lowest."""
    if of is None:
        return None
    gained = of.true_positives
    at = np.unique(np.linspace(0, len(gained) - 1, min(CURVE_POINTS, len(gained))).astype(int))
    # before a score's positives are gained, all negatives above it are passed: two points per score
    before = np.stack([of.above, gained - of.gained], axis=1)[at]
    after = np.stack([of.at_or_above, gained], axis=1)[at]
    roc = np.stack([before, after], axis=1).reshape(-1, 2) / (of.negatives, of.positives)
    roc = np.concatenate([[[0.0, 0.0]], roc, [[1.0, 1.0]]])
    precision = (gained / (gained + of.at_or_above))[at]
    return {
        "fpr": roc[:, 0].tolist(),
        "tpr": roc[:, 1].tolist(),
        "recall": [0.0, *(gained / of.positives)[at].tolist()],
        "precision": [float(precision[0]), *precision.tolist()],
    }


def mean_report(sets: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The plain mean over classes of every metric, over those that have it; None where none has."""
    means: dict[str, float | None] = {}
    for name in (*METRICS, "aupro_200"):
        values = [entry[name] for entry in sets.values() if entry[name] is not None]
        means[name] = float(np.mean(values)) if values else None
    return means
