"""Batches of drawn pictures for CLIP's image side, prepared ahead of the step that takes them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flawline.camera.synthetic import DEFECT_KINDS, UNSEEN_DEFECT_KINDS
from flawline.models.training.augment import augment
from flawline.models.training.pictures import Pictures

LITE0_MEAN, LITE0_STD = 127.0 / 255.0, 128.0 / 255.0


@dataclass
class Batch:
    """One step's pictures: (B, 3, S, S) normalised, (B, S, S) 0 or 1, the same of the asked kind, and that kind."""

    images: Tensor
    truth: Tensor
    kind_truth: Tensor
    asked: Tensor  # (B,) int64, place in DEFECT_KINDS
    chance: Tensor  # (B,) int64, a number drawn for each, to choose words by

    def shares(self, count: int) -> list["Batch"]:
        """The batch in `count` parts, one for each thread."""
        planes = (self.images, self.truth, self.kind_truth, self.asked, self.chance)
        return [Batch(*parts) for parts in zip(*(plane.chunk(count) for plane in planes), strict=True)]

    def truths(self, size: int) -> tuple[Tensor, Tensor]:
        """Both truths at `size` x `size`, shares of the area."""
        planes = torch.stack([self.truth, self.kind_truth], dim=1)
        general, kind = functional.interpolate(planes, (size, size), mode="area").unbind(dim=1)
        return general, kind


def batches(pictures: Pictures, count: int, sizes: tuple[int, ...], seed: int, start: int) -> Iterator[Batch]:
    """`count` pictures each, cropped to one of `sizes`, from step `start` on; two are prepared ahead."""
    known = [place for place, kind in enumerate(DEFECT_KINDS) if kind not in UNSEEN_DEFECT_KINDS]

    def make(step: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        size = int(rng.choice(sizes))
        images, truths, kind_truths, asked = [], [], [], []
        for index in rng.integers(0, len(pictures), count):
            image, (kinds,) = augment(rng, pictures.image[index], [pictures.kinds[index]], size)
            present = [int(kind) - 1 for kind in np.unique(kinds) if kind]
            asked.append(int(rng.choice(present if present and rng.random() < 0.75 else known)))
            images.append(image)
            truths.append(kinds > 0)
            kind_truths.append(kinds == asked[-1] + 1)
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        return Batch(
            ((stacked / 255.0 - LITE0_MEAN) / LITE0_STD).contiguous(memory_format=torch.channels_last),
            torch.from_numpy(np.stack(truths)).float(),
            torch.from_numpy(np.stack(kind_truths)).float(),
            torch.tensor(asked),
            torch.from_numpy(rng.integers(0, 2**31, count)),
        )

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(make, start), pool.submit(make, start + 1)]
        step = start + 2
        while True:
            ready = ahead.pop(0).result()
            ahead.append(pool.submit(make, step))
            step += 1
            yield ready
