"""How good a bundle in training is on drawn defects of families that it never saw: its maps, and SAM's answers."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.metrics import rank_metrics
from flawline.models.refine import MaskRefiner
from flawline.models.training.pictures import Pictures
from flawline.models.training.sam_prompts import SMALLEST_PX, Rng, draw_points, single_defects
from flawline.models.training.train_sam import mask_iou


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


def held_out_prompts(pictures: Pictures, seed: int) -> Iterator[tuple[int, NDArray[np.bool_], Rng]]:
    """One defect of every bad picture, always the same ones."""
    for row in range(len(pictures)):
        rng = np.random.default_rng((seed, row))
        count, labels = single_defects(np.asarray(pictures.kinds[row]))
        areas = np.bincount(labels.ravel())[1:count]
        large = np.flatnonzero(areas >= SMALLEST_PX) + 1
        if len(large):
            yield row, labels == int(rng.choice(large)), rng


@torch.no_grad()
def prompt_quality(sam: Any, pictures: Pictures, seed: int = 5) -> dict[str, float]:
    """Mean IoU, the mask chosen by predicted IoU: from one positive point, from a box, from both; and of both where
    the defect has at least 350 px of SAM's frame."""
    refiner = MaskRefiner(sam)
    ious: dict[str, list[float]] = {"point_iou": [], "box_iou": [], "box_point_iou": [], "box_point_iou_large": []}
    for row, mask, rng in held_out_prompts(pictures, seed):
        image = torch.from_numpy(np.asarray(pictures.image[row])).permute(2, 0, 1).unsqueeze(0).float()
        embedding = sam.image_encoder(sam.preprocess(image))
        at, label, there = (torch.from_numpy(part).unsqueeze(0) for part in draw_points(rng, mask, 1, 0))
        ys, xs = np.nonzero(mask)
        box = torch.tensor([[xs.min(), ys.min(), xs.max(), ys.max()]], dtype=torch.float32)
        wanted = torch.from_numpy(mask).unsqueeze(0).float()
        none = torch.zeros_like(there)
        for name, shown, with_box in (
            ("point_iou", there, None),
            ("box_iou", none, box),
            ("box_point_iou", there, box),
        ):
            logits, scores = refiner.decode(embedding, at, label, shown, with_box)
            chosen = int(scores[0, 1:].argmax()) + 1
            full = functional.interpolate(logits[:, chosen : chosen + 1], mask.shape, mode="bilinear")
            ious[name].append(float(mask_iou(full, wanted)[0, 0]))
        if mask.sum() >= 350:
            ious["box_point_iou_large"].append(ious["box_point_iou"][-1])
    return {name: float(np.mean(values)) for name, values in ious.items()}
