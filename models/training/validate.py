"""How well the maps of a bundle in training find drawn defects of families that it never saw."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser


@torch.no_grad()
def clip_maps(
    clip: DenseClip, adapter: AdapterLocaliser, images: NDArray[np.uint8], texts: Sequence[Tensor], size: int
) -> NDArray[np.float32]:
    """(N, H, W, 3) RGB and the (D, 2) text features of each -> (N, size, size) P(abnormal)."""
    maps = []
    for start in range(0, len(images), 8):
        part = torch.from_numpy(np.asarray(images[start : start + 8])).permute(0, 3, 1, 2).float()
        if part.shape[-1] != size:
            part = functional.interpolate(part, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        taps = clip.dense(clip.normalise(part).contiguous(memory_format=torch.channels_last)).taps
        for row, text in enumerate(texts[start : start + 8]):
            maps.append(adapter([tap[row : row + 1] for tap in taps], text, size)[0].numpy())
    return np.stack(maps)


def figures(maps: NDArray[np.float32], truth: NDArray[Any]) -> dict[str, float]:
    """Pixel AUROC, largest F1 and its threshold, average precision, and image AUROC by the map's maximum."""
    scores, labels = maps.reshape(-1), truth.reshape(-1)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order], dtype=np.float64)
    ranks = np.arange(1, len(hits) + 1)
    last = np.append(np.diff(scores[order]) != 0, True)
    precision, recall = hits[last] / ranks[last], hits[last] / hits[-1]
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "pixel_auroc": auroc(scores, labels),
        "pixel_f1_max": float(f1.max()),
        "at": float(scores[order][last][f1.argmax()]),
        "pixel_ap": float((precision * np.diff(recall, prepend=0.0)).sum()),
        "image_auroc": auroc(
            maps.reshape(len(maps), -1).max(axis=1), np.asarray(truth.reshape(len(truth), -1).any(axis=1))
        ),
    }


def auroc(scores: NDArray[np.float32], labels: NDArray[Any]) -> float:
    """Area under the ROC curve, ties counted half; nan where a class is missing."""
    positives, negatives = np.sort(scores[labels]), scores[~labels]
    if not len(positives) or not len(negatives):
        return float("nan")
    below = np.searchsorted(positives, negatives, side="left") + np.searchsorted(positives, negatives, side="right")
    return float(1.0 - below.mean() / (2 * len(positives)))
