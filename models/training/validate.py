"""How well the maps of a bundle in training find drawn defects of families that it never saw."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.metrics import rank_metrics


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


def figures(maps: NDArray[np.float32], truth: NDArray[np.bool_]) -> dict[str, float]:
    """Of (N, h, w) maps and truths: pixel AUROC, largest F1 and its threshold, average precision, and image AUROC by
    the map's maximum; nan where a class is missing."""
    pixel = rank_metrics(maps[truth], maps[~truth])
    return {
        "pixel_auroc": _number(pixel.auroc),
        "pixel_f1_max": _number(pixel.f1_max),
        "at": _number(pixel.f1_threshold),
        "pixel_ap": _number(pixel.ap),
        "image_auroc": auroc(
            maps.reshape(len(maps), -1).max(axis=1), np.asarray(truth.reshape(len(truth), -1).any(axis=1))
        ),
    }


def auroc(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, ties counted half; nan where a class is missing."""
    return _number(rank_metrics(scores[labels], scores[~labels]).auroc)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
