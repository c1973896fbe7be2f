"""The one augmentation of the linear layers' training: four pictures of a class pasted to one. No torch here."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawline.models.datasets import Sample
from flawline.models.ground_truth import read_rgb, truth


def draw_four(samples: Sequence[Sample], rng: np.random.Generator) -> list[Sample]:
    """Four samples of one class: each time a type of defect (or good) at random, then one of its pictures."""
    kinds = sorted({sample.defect for sample in samples})
    by_kind = {kind: [sample for sample in samples if sample.defect == kind] for kind in kinds}
    chosen = []
    for _ in range(4):
        of_kind = by_kind[kinds[rng.integers(len(kinds))]]
        chosen.append(of_kind[rng.integers(len(of_kind))])
    return chosen


def mosaic(four: Sequence[Sample]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """2 x 2 pictures and their masks, each tile of the first picture's size: (2H, 2W, 3) uint8, (2H, 2W) bool."""
    pictures = [read_rgb(sample.image) for sample in four]
    height, width = pictures[0].shape[:2]
    whole = np.empty((2 * height, 2 * width, 3), np.uint8)
    marked = np.zeros((2 * height, 2 * width), bool)
    for number, (sample, picture) in enumerate(zip(four, pictures, strict=True)):
        rows = slice((number // 2) * height, (number // 2 + 1) * height)
        columns = slice((number % 2) * width, (number % 2 + 1) * width)
        if picture.shape[:2] != (height, width):
            resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
            whole[rows, columns] = np.asarray(resized)
        else:
            whole[rows, columns] = picture
        mask = truth(sample, picture.shape[:2], (height, width))
        if mask is not None:
            marked[rows, columns] = mask
    return whole, marked
