"""Trains CLIP's pyramid and linear layers on, while the trunk and the text tower stay as they are.

The trunk's features of every picture, changed at random a few times, are computed once; what is trained on them is
small and soon done. The text says where to: directions of normal, abnormal and every kind as the text tower gives
them. In the end the new weights are averaged with the former: that is better than either on families never seen.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.camera.synthetic import DEFECT_KINDS, STATE_WORDS, UNSEEN_DEFECT_KINDS
from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.text import mean_direction
from flawline.models.training.augment import augment
from flawline.models.training.losses import finishing_loss, segmentation_loss
from flawline.models.training.pictures import Pictures
from flawline.models.training.train_clip import KIND_WEIGHT, defect_losses
from flawline.models.words import STATES_ABNORMAL, STATES_NORMAL, ensemble

KNOWN_KINDS = tuple(place for place, kind in enumerate(DEFECT_KINDS) if kind not in UNSEEN_DEFECT_KINDS)
STRIDES = (8, 16, 32)
PLAIN_NAME = 0.6  # of the pictures are asked for as "object", as where a recipe has no name; the others by any name


@dataclass(frozen=True)
class PyramidSchedule:
    """How long and how fast."""

    steps: int = 0  # 0: the pyramid stays as it is
    finish: float = 0.3  # the last share of them with mostly focal and dice
    batch: int = 16
    size: int = 320  # edge of a picture, px
    copies: int = 4  # of every picture, each changed in its own way
    rate: float = 1e-3  # of blocks; of what was trained before half of it
    bfloat16: bool = False  # products of matrices
    kept: float = 0.25  # share of the former weights in the average
    seed: int = 9
    checkpoint_every: int = 1000
    threads: int = 2  # each takes its share of a batch

    def rate_share(self, step: int) -> float:
        """Of the full rate: a rise, then half a cosine down."""
        return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


@dataclass
class Batch:
    """One step: backbone features, (B, q, q) shares of all defects and of the asked kind, (B, D) directions of both."""

    features: list[Tensor]
    truth: Tensor
    kind_truth: Tensor
    general: Tensor
    special: Tensor

    def share(self, place: int, count: int) -> "Batch":
        """Every `count`-th row from `place` on."""
        part = slice(place, None, count)
        planes = (self.truth, self.kind_truth, self.general, self.special)
        return Batch([level[part] for level in self.features], *(plane[part] for plane in planes))


class BackboneFeatures:
    """Features at strides 8, 16, 32 of `copies` changed copies of every picture, half precision, and their labels."""

    def __init__(
        self, clip: DenseClip, pictures: Pictures, schedule: PyramidSchedule, folder: Path, say: Callable[[str], None]
    ) -> None:
        backbone: Any = clip.model.visual.trunk.backbone
        weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in backbone.state_dict().values()))
        key = f"{schedule.size}-{schedule.copies}-{len(pictures)}-{weights.hexdigest()[:12]}"
        files = [folder / f"pyramid-{name}-{key}.npy" for name in (*STRIDES, "kinds")]
        if not all(file.exists() for file in files):
            _compute(clip, pictures, schedule, files, say)
        *self.levels, self.kinds = (np.load(file, mmap_mode="c") for file in files)

    def __len__(self) -> int:
        return len(self.kinds)


def _compute(
    clip: DenseClip,
    pictures: Pictures,
    schedule: PyramidSchedule,
    files: Sequence[Path],
    say: Callable[[str], None],
) -> None:
    trunk: Any = clip.model.visual.trunk
    count, size, at_once = schedule.copies * len(pictures), schedule.size, 8
    with torch.inference_mode():
        levels = trunk.backbone_features(torch.zeros(1, 3, size, size))
    shapes = [(count, *level.shape[1:]) for level in levels] + [(count, size, size)]
    stored = [
        np.lib.format.open_memmap(file.with_suffix(".partial"), "w+", kind, shape)
        for file, kind, shape in zip(files, [np.float16] * len(levels) + [np.uint8], shapes, strict=True)
    ]

    def work(start: int) -> None:
        torch.set_num_threads(1)
        rows = range(start, min(start + at_once, count))
        made = [
            augment(
                np.random.default_rng((schedule.seed, row)),
                pictures.image[row % len(pictures)],
                [pictures.kinds[row % len(pictures)]],
                size,
            )
            for row in rows
        ]
        images = torch.from_numpy(np.stack([image for image, _ in made])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            found = trunk.backbone_features(clip.normalise(images).contiguous(memory_format=torch.channels_last))
        for array, level in zip(stored, found, strict=False):
            array[start : rows.stop] = level.half().numpy()
        stored[-1][start : rows.stop] = np.stack([planes[0] for _, planes in made])

    began = time.monotonic()
    with ThreadPoolExecutor(schedule.threads, "features") as pool:
        for number, _ in enumerate(pool.map(work, range(0, count, at_once))):
            if number % 200 == 0:
                say(f"pyramid: features of {number * at_once}/{count} pictures, {time.monotonic() - began:.0f} s")
    for array, file in zip(stored, files, strict=True):
        array.flush()
        file.with_suffix(".partial").replace(file)


@torch.no_grad()
def directions(clip: DenseClip, names: Sequence[str]) -> Tensor:
    """(n, 2 + kinds, D): where the text tower puts normal, abnormal and every known kind of each thing."""
    found = torch.zeros(len(names), 2 + len(DEFECT_KINDS), clip.embed_dim)
    for row, name in enumerate(names):
        found[row, 0] = mean_direction(clip, ensemble(name, STATES_NORMAL))
        found[row, 1] = mean_direction(clip, ensemble(name, STATES_ABNORMAL))
        for kind in KNOWN_KINDS:
            states = STATE_WORDS[DEFECT_KINDS[kind]]
            found[row, 2 + kind] = mean_direction(clip, [f"a photo of a {state.format(name)}" for state in states])
    return found


def draw_batch(features: BackboneFeatures, asked_by: Tensor, schedule: PyramidSchedule, step: int) -> Batch:
    """The same pictures for the same step; of each one kind is asked for, mostly one that it shows."""
    rng = np.random.default_rng((schedule.seed, step))
    rows = rng.integers(0, len(features), schedule.batch)
    labels: NDArray[np.uint8] = features.kinds[rows]
    asked = []
    for plane in labels:
        present = [int(kind) - 1 for kind in np.unique(plane) if int(kind) - 1 in KNOWN_KINDS]
        asked.append(int(rng.choice(present if present and rng.random() < 0.75 else KNOWN_KINDS)))
    named = [0 if rng.random() < PLAIN_NAME else int(rng.integers(len(asked_by))) for _ in rows]
    wanted, kinds, planes = asked_by[named], torch.tensor(asked), torch.from_numpy(labels)

    def area(marked: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(marked.float().unsqueeze(1), schedule.size // 4).squeeze(1)

    return Batch(
        [torch.from_numpy(level[rows]).float() for level in features.levels],
        area(planes > 0),
        area(planes == (kinds + 1)[:, None, None]),
        wanted[:, 1] - wanted[:, 0],
        wanted[torch.arange(len(rows)), 2 + kinds] - wanted[:, 0],
    )


def map_loss(
    trunk: Any, adapter: AdapterLocaliser, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor], bfloat16: bool
) -> Tensor:
    """Maps of all defects, per tap and of their mean, and the mean map of the asked kind."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        taps = trunk.pyramid([level.contiguous(memory_format=torch.channels_last) for level in batch.features])
    directions, truths = (batch.general, batch.special), (batch.truth, batch.kind_truth)
    all_defects, kind, _ = defect_losses(adapter, taps, directions, truths, loss)
    return all_defects + KIND_WEIGHT * kind


def step_gradients(
    trunk: Any, adapter: AdapterLocaliser, weights: list[Tensor], finishing: bool, bfloat16: bool, batch: Batch
) -> tuple[list[Tensor], float]:
    """Gradients of one share of a batch, and its loss. On one thread of torch's."""
    torch.set_num_threads(1)
    loss = map_loss(trunk, adapter, batch, finishing_loss if finishing else segmentation_loss, bfloat16)
    return list(torch.autograd.grad(loss, weights)), float(loss.detach())


def train_pyramid(
    clip: DenseClip,
    adapter: AdapterLocaliser,
    pictures: Pictures,
    schedule: PyramidSchedule,
    folder: Path,
    say: Callable[[str], None],
    validate: Callable[[], dict[str, float]],
) -> None:
    """Train in place, going on from the checkpoint in `folder` where there is one."""
    trunk: Any = clip.model.visual.trunk
    asked_by = directions(clip, ["object", *sorted({entry["object"] for entry in pictures.words})])
    features = BackboneFeatures(clip, pictures, schedule, folder, say)
    modules = torch.nn.ModuleList([trunk.laterals, trunk.smooth, trunk.deepen, adapter])
    former = {name: value.clone() for name, value in modules.state_dict().items()}
    blocks = list(trunk.deepen.parameters())
    others = [weight for module in (trunk.laterals, trunk.smooth, adapter) for weight in module.parameters()]
    weights: list[Tensor] = [*blocks, *others]
    for weight in weights:
        weight.requires_grad_(True)
    groups = [
        {"params": blocks, "lr": schedule.rate, "top": schedule.rate},
        {"params": others, "lr": schedule.rate, "top": 0.5 * schedule.rate},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.clone() for name, value in modules.state_dict().items()}
    checkpoint, start = folder / "pyramid-training.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start, former, average = saved["step"], saved["former"], saved["average"]
        modules.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        say(f"pyramid: going on from step {start}")
    pool, ahead = ThreadPoolExecutor(schedule.threads, "share"), ThreadPoolExecutor(1, "draw")
    drawing = ahead.submit(draw_batch, features, asked_by, schedule, start)
    began, seen = time.monotonic(), []
    for step in range(start, schedule.steps):
        batch = drawing.result()
        drawing = ahead.submit(draw_batch, features, asked_by, schedule, step + 1)
        for group in optimiser.param_groups:
            group["lr"] = group["top"] * schedule.rate_share(step)
        finishing = step >= (1.0 - schedule.finish) * schedule.steps
        work = partial(step_gradients, trunk, adapter, weights, finishing, schedule.bfloat16)
        made = list(pool.map(work, [batch.share(place, schedule.threads) for place in range(schedule.threads)]))
        for weight, *shares in zip(weights, *(gradients for gradients, _ in made), strict=True):
            weight.grad = sum(shares[1:], shares[0]) / schedule.threads
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        state = modules.state_dict()
        keep = min(0.998, (step + 1) / (step + 20))
        for name, value in state.items():
            average[name].lerp_(value, 1 - keep)
        seen.append(sum(loss for _, loss in made) / schedule.threads)
        done = step + 1
        if done % 100 == 0:
            pace = f"{(done - start) / (time.monotonic() - began):.2f} steps/s"
            say(f"pyramid step {done}/{schedule.steps} loss {np.mean(seen):.3f} {pace}")
            seen.clear()
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            saved = {"step": done, "weights": state, "optimiser": optimiser.state_dict()}
            torch.save(saved | {"average": average, "former": former}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            held = {name: value.clone() for name, value in state.items()}
            modules.load_state_dict({name: average[name].lerp(former[name], schedule.kept) for name in average})
            say(f"pyramid step {done} unseen families: " + " ".join(f"{k} {v:.3f}" for k, v in validate().items()))
            if done < schedule.steps:
                modules.load_state_dict(held)
    pool.shutdown()
    ahead.shutdown()
    modules.requires_grad_(False)
