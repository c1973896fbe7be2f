"""Another encoder for F of the point prompts than SAM's own: a backbone of timm or torchvision (section 3.1.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from flawline.config.errors import BundleError, ConfigError
from flawline.models.checkpoints import load_weights, read_state_dict
from flawline.models.sam import SAM_MEAN, SAM_STD

STRIDE = 16  # the coarsest level used: that of SAM's own embedding
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class FeatureEncoder(nn.Module):
    """Features over SAM's padded frame of `size` pixels: they take the place of SAM's embedding in the prompts.

    `name` is the recipe's `features`, `timm:NAME` or `torchvision:NAME`. The weights are `NAME.safetensors`,
    `.pth`, `.pt` or `.bin` as the library publishes them, in one of `folders`; nothing is downloaded, and
    there is no running without. Raises ConfigError where the name is unknown or has no weights, BundleError
    where the file does not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, size: int, folders: Sequence[Path]) -> None:
        super().__init__()
        library, _, model = name.partition(":")
        if library not in ("timm", "torchvision") or not model:
            raise ConfigError(f"features = {name!r}: must be `sam`, `timm:NAME` or `torchvision:NAME`")
        known = timm.is_model(model) if library == "timm" else model in torchvision.models.list_models()
        if not known:
            raise ConfigError(f"features = {name!r}: {library} has no model of this name")
        weights = _weights(name, model, folders)
        self.size = size
        mean, std = (torch.tensor(triple) / 255.0 for triple in (SAM_MEAN, SAM_STD))  # ImageNet's
        if library == "timm":
            self.backbone, self.size, mean, std = _from_timm(model, size, weights)
        else:
            self.backbone = _from_torchvision(model, weights)
        self.padded_size = size
        self.register_buffer("mean", mean.view(1, 3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1) * 255.0, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, fitted: Tensor) -> Tensor:
        """(B, 3, sam_height, sam_width) RGB in [0, 255] -> (B, C, h, w) over the padded square."""
        image = (fitted.to(self.mean.dtype) - self.mean) / self.std
        right, below = (self.padded_size - fitted.shape[axis] for axis in (-1, -2))
        image = functional.pad(image, (0, right, 0, below))
        if self.size != self.padded_size:
            size = (self.size, self.size)
            image = functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        features: Tensor = self.backbone(image)
        return features


class _FinestLevel(nn.Module):
    """A chain of stages, as far as the output is not coarser than STRIDE."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> Tensor:
        features = image
        for stage in self.stages:
            following = stage(features)
            if following.shape[-1] * STRIDE < image.shape[-1]:
                break
            features = following
        return features


class _TimmLevel(nn.Module):
    """One level of a timm model, as far as it must be run for it."""

    def __init__(self, model: Any, level: int) -> None:
        super().__init__()
        self.model, self.level = model, level

    def forward(self, image: Tensor) -> Tensor:
        levels = self.model.forward_intermediates(
            image, indices=[self.level], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        features: Tensor = levels[0]
        return features


def _from_timm(name: str, size: int, weights: Path) -> tuple[nn.Module, int, Tensor, Tensor]:
    """The last useful level of a timm model, the input size it takes nearest to `size`, and its mean and std."""
    options: dict[str, Any] = {}
    try:
        with torch.device("meta"):  # the structure only
            strides = [level["reduction"] for level in timm.create_model(name).feature_info]
        level = max(index for index, stride in enumerate(strides) if stride <= STRIDE)
        if timm.get_pretrained_cfg(name).fixed_input_size:  # a transformer takes whole patches only
            size = max(1, round(size / strides[level])) * strides[level]
            options["img_size"] = size
        # not timm's `features_only`: with that it accepts a file of other weights, and stays random
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, **options)
        with torch.no_grad():  # whether it can; and in eval mode, for a batch norm learns from whatever it sees
            model.eval().forward_intermediates(torch.zeros(1, 3, size, size), indices=[level], intermediates_only=True)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BundleError(f"{weights}: gives no features of timm's {name}: {reason}") from error
    settled = timm.data.resolve_model_data_config(model)
    return _TimmLevel(model, level), size, torch.tensor(settled["mean"]), torch.tensor(settled["std"])


def _from_torchvision(name: str, weights: Path) -> nn.Module:
    """The convolutional part of a torchvision classifier. Raises ConfigError where it has none."""
    model: Any = torchvision.models.get_model(name, weights=None)
    load_weights(model, read_state_dict(weights), weights)
    if hasattr(model, "layer4"):
        stem = [model.conv1, model.bn1, model.relu, model.maxpool]
        return _FinestLevel([*stem, model.layer1, model.layer2, model.layer3, model.layer4])
    stages = getattr(model, "features", None)
    if not isinstance(stages, nn.Sequential) or name.startswith("swin"):
        raise ConfigError(f"features = 'torchvision:{name}': has no convolutional features; timm may have it")
    return _FinestLevel(list(stages))


def _weights(name: str, model: str, folders: Sequence[Path]) -> Path:
    places = [folder / f"{model}{suffix}" for folder in folders for suffix in SUFFIXES]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(folder) for folder in folders) or "no folder"
    raise ConfigError(f"features = {name!r}: no weights; put {model}.safetensors or {model}.pth into one of: {looked}")
