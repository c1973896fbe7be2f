"""From the final anomaly map to the decision: defects, mask, score. NumPy and OpenCV only."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import FlawlineError
from flawline.config.recipe import Recipe
from flawline.models.results import Defect

Map = NDArray[np.float32]  # (H, W) in [0, 1]
Mask = NDArray[np.bool_]  # (H, W)
LEAST = float(np.nextafter(np.float32(0.0), np.float32(1.0)))


def counted_region(recipe: Recipe, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the region of interest, cut to the frame; the whole frame where there is none."""
    if recipe.roi is None:
        return slice(0, height), slice(0, width)
    x, y, w, h = recipe.roi
    return slice(min(y, height), min(y + h, height)), slice(min(x, width), min(x + w, width))


@lru_cache(maxsize=64)
def counted_pixels(recipe: Recipe, height: int, width: int) -> int:
    """How many pixels of the region of interest lie in no ignored box."""
    counted = np.zeros((height, width), np.uint8)
    counted[counted_region(recipe, height, width)] = 1
    blank_ignored(recipe, counted)
    return int(np.count_nonzero(counted))


def blank_ignored(recipe: Recipe, anomaly_map: Any) -> None:
    """Set the boxes to ignore to zero, in place, in the frame's map, an array or a tensor (H, W)."""
    for x, y, w, h in recipe.ignore:
        anomaly_map[y : y + h, x : x + w] = 0.0


def decide(anomaly_map: Map, recipe: Recipe, threshold: float) -> tuple[Mask, list[Defect], float]:
    """The mask, its defects (largest first) and the image score.

    A defect is an 8-connected component of `anomaly_map >= threshold` with at least `min_defect_area_px`
    pixels; the mask is their union. The score is the largest threshold at which there would be one, 0.0
    where there is none at any, so that there are defects if and only if score >= threshold (for thresholds
    above 0). What does not count (outside the region, ignored) must be zero in the map: zero is never a defect,
    also at a threshold of 0. Raises FlawlineError where the map holds a value that is no number.
    """
    score = image_score(anomaly_map, recipe.min_defect_area_px)
    mask, defects = components(anomaly_map, max(threshold, LEAST), recipe.min_defect_area_px, recipe.mm_per_px)
    return mask, defects, score


def components(
    anomaly_map: Map, threshold: float, min_area: int, mm_per_px: float | None = None
) -> tuple[Mask, list[Defect]]:
    """Defects at one threshold, largest first, and their union."""
    labels, stats, centroids = _label(anomaly_map >= as_float32(threshold))
    large = np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= min_area)
    large = large[large > 0]
    defects = []
    for label in large:
        x, y, w, h, area = (int(value) for value in stats[label])
        inside = labels[y : y + h, x : x + w] == label
        defects.append(
            Defect(
                bbox=(x, y, w, h),
                area_px=area,
                centroid=(float(centroids[label, 0]), float(centroids[label, 1])),
                score=float(anomaly_map[y : y + h, x : x + w][inside].max()),
                area_mm2=None if mm_per_px is None else area * mm_per_px**2,
            )
        )
    defects.sort(key=lambda defect: -defect.area_px)
    if len(large) == len(stats) - 1:
        mask: Mask = labels > 0
    else:
        kept = np.zeros(len(stats), bool)
        kept[large] = True
        mask = kept[labels]
    return mask, defects


def as_float32(threshold: float) -> np.float32:
    """The smallest float32 not below `threshold`: comparing pixels and comparing scores then agree."""
    rounded = np.float32(threshold)
    return rounded if float(rounded) >= threshold else np.nextafter(rounded, np.float32(np.inf))


def peak(anomaly_map: Map) -> float:
    """The largest value, 0.0 of an empty map. Raises FlawlineError where a value is no number.

    Not a number is never above a threshold: such a part would pass. Only an inspection that came to an end may.
    """
    largest = float(anomaly_map.max(initial=0.0))
    if not math.isfinite(largest):
        raise FlawlineError("the models gave an anomaly map that holds values that are no numbers")
    return largest


def image_score(anomaly_map: Map, min_area: int) -> float:
    """Largest t with an 8-connected component of `anomaly_map >= t` of at least `min_area` pixels; 0.0 if none.

    Component areas only grow as t falls, so t is found by bisection over the values of the map. Whatever
    passes at a higher t lies inside what passes at a lower one: the search shrinks to that after a few steps.
    """
    top = peak(anomaly_map)
    if top <= 0.0:
        return 0.0
    region = anomaly_map
    for factor in (0.95, 0.8, 0.5, 0.2, 0.0):
        low = np.float32(top * factor) if factor else np.float32(LEAST)
        box = _box_of_large(region >= low, min_area)
        if box is not None:
            region = region[box]
            break
    else:
        return 0.0
    values = np.unique(region[region >= low])
    return float(values[_last_true(lambda i: _box_of_large(region >= values[i], min_area) is not None, len(values))])


def _last_true(holds: Callable[[int], bool], count: int) -> int:
    """Largest i below count for which a monotone condition holds; it holds at 0."""
    first, last = 0, count - 1
    while first < last:
        middle = (first + last + 1) // 2
        if holds(middle):
            first = middle
        else:
            last = middle - 1
    return first


def _box_of_large(binary: Mask, min_area: int) -> tuple[slice, slice] | None:
    """The box around all components of at least `min_area` pixels, or None."""
    if np.count_nonzero(binary) < min_area:
        return None
    _, stats, _ = _label(binary)
    large = stats[1:][stats[1:, cv2.CC_STAT_AREA] >= min_area]
    if not len(large):
        return None
    x0, y0 = large[:, 0].min(), large[:, 1].min()
    x1, y1 = (large[:, 0] + large[:, 2]).max(), (large[:, 1] + large[:, 3]).max()
    return slice(int(y0), int(y1)), slice(int(x0), int(x1))


def _label(binary: Mask) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
    plane = np.ascontiguousarray(binary).view(np.uint8)
    _, labels, stats, centroids = cv2.connectedComponentsWithStats(plane, connectivity=8, ltype=cv2.CV_32S)
    return labels, stats, centroids
