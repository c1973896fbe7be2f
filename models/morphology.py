"""Regions of a map as tensors: Otsu's cut, the highest share, dilation with OpenCV's shapes, connected parts."""

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

SHAPES = {"ellipse": cv2.MORPH_ELLIPSE, "rect": cv2.MORPH_RECT, "cross": cv2.MORPH_CROSS}
GREY_LEVELS = 256

Span = tuple[int, int]  # first and last offset, both inside


def above_otsu(anomaly_map: Tensor) -> Tensor:
    """(B, S, S) in [0, 1] -> (B, S, S) bool: above each map's own Otsu threshold on 256 grey levels.

    Zeros are what does not count (ignored boxes; a probability is above zero). A map of a single grey level has
    nothing above it.
    """
    batch = anomaly_map.shape[0]
    levels = (anomaly_map.flatten(1) * (GREY_LEVELS - 1)).round().clamp(0, GREY_LEVELS - 1).long()
    counts = torch.zeros(batch, GREY_LEVELS, dtype=torch.long, device=levels.device)
    counts.scatter_add_(1, levels, (anomaly_map.flatten(1) > 0).long())
    share = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    grey = torch.arange(GREY_LEVELS, dtype=torch.double, device=levels.device)
    below = share.cumsum(1)  # weight of the class of levels <= t
    moment = (share * grey).cumsum(1)
    between = (moment[:, -1:] * below - moment).square() / (below * (1.0 - below)).clamp_min(1e-12)
    threshold = between.argmax(1, keepdim=True)
    single = (counts > 0).sum(1, keepdim=True) <= 1
    return ((levels > threshold) & ~single & (anomaly_map.flatten(1) > 0)).view_as(anomaly_map)


def highest_share(anomaly_map: Tensor, percent: float) -> Tensor:
    """(B, S, S) -> (B, S, S) bool: the highest `percent` of each map's pixels, ties at the edge included, zeros not."""
    flat = anomaly_map.flatten(1)
    pixels = flat.shape[1]
    count = min(max(int(pixels * percent / 100.0 + 0.5), 1), pixels)
    edge = flat.kthvalue(pixels - count + 1, dim=1).values
    return (anomaly_map >= edge[:, None, None]) & (anomaly_map > 0)


@lru_cache(maxsize=64)
def structuring_rows(shape: str, size: int) -> dict[Span, list[int]]:
    """OpenCV's structuring element as rows: x offsets from its anchor -> the y offsets of the rows that have them."""
    element = cv2.getStructuringElement(SHAPES[shape], (size, size))
    anchor = size // 2
    rows: dict[Span, list[int]] = {}
    for y, row in enumerate(element):
        columns = np.flatnonzero(row)  # each row of the three shapes is one run
        rows.setdefault((int(columns[0]) - anchor, int(columns[-1]) - anchor), []).append(y - anchor)
    return rows


def dilate(mask: Tensor, shape: str, size: int) -> Tensor:
    """(B, H, W) bool -> the same, equal to `cv2.dilate` with that element and its default anchor and border.

    A run of a row holds a marked pixel exactly where the running count differs between its two ends, so a
    run of any length costs one comparison.
    """
    height, width = mask.shape[-2:]
    margin = size
    padded = torch.nn.functional.pad(mask, (margin + 1, margin, margin, margin))
    # counts[x + margin + 1]: marked pixels up to x; bytes may wrap, a run shorter than 256 still differs
    counts = padded.cumsum(-1, dtype=torch.uint8 if size < 256 else torch.int32)
    dilated = torch.zeros_like(mask)
    for (first, last), offsets in structuring_rows(shape, size).items():
        before, end = margin + first, margin + 1 + last
        hit = counts[..., before : before + width] != counts[..., end : end + width]
        for offset in offsets:
            dilated |= hit[..., margin + offset : margin + offset + height, :]
    return dilated


def connected_parts(mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(B, H, W) bool -> its 8-connected components (R, H, W) bool, and the frame (R,) int64 each belongs to.

    Per frame the largest first, at most `most`; a frame without any gets one empty part, so that every
    frame has a row. Reads the mask on the host.
    """
    parts: list[np.ndarray] = []
    owners: list[int] = []
    for frame, plane in enumerate(mask.cpu().numpy().astype(np.uint8)):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        largest = np.argsort(-areas, kind="stable")[:most] + 1 if count > 1 else np.array([count])
        parts += [labels == label for label in largest]
        owners += [frame] * len(largest)
    return torch.from_numpy(np.stack(parts)).to(mask.device), torch.tensor(owners, device=mask.device)
