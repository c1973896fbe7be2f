"""CLIP through open_clip: building and loading it, its dense image features and its text features."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from flawline.config.errors import BundleError
from flawline.models.bundle import ClipSettings
from flawline.models.checkpoints import load_weights, read_state_dict
from flawline.models.lean_imports import with_transformers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SENTENCES_AT_ONCE = 64


@dataclass(frozen=True)
class DenseFeatures:
    """What the image tower says of a batch: one grid of features per tap, finest first.

    `taps`: per tap (B, C_i, h_i, w_i), raw block outputs without the final norm, class token dropped.
    `levels`: what a memory of good parts compares: the taps, or what the tower names for it (`memory_levels`).
    """

    taps: list[Tensor]
    levels: list[Tensor]


class DenseClip(nn.Module):
    """An open_clip model read densely: `model` is open_clip's own, with its own weights and forward.

    The image frame is square, S = `input_size`. Towers of patches (ViT) and of convolutions go the same
    way; they differ only in how taps are counted (see `ClipSettings.taps`).
    """

    def __init__(self, settings: ClipSettings, folder: Path) -> None:
        super().__init__()
        config = model_config(settings, folder)
        self.settings = settings
        self.input_size = settings.input_size
        self.model = build_open_clip(config)
        self._config = config
        self.indices = tap_indices(self.model.visual, settings.taps)
        self._memory_indices = list(getattr(getattr(self.model.visual, "trunk", None), "memory_levels", ()))
        self.embed_dim = int(config["embed_dim"])
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        mean, std = (torch.tensor(value) for value in (settings.mean or CLIP_MEAN, settings.std or CLIP_STD))
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)
        self.eval()

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's; made when the first sentence comes, for text features are mostly read from the disk."""
        return _tokenizer(self.settings, self._config)

    @property
    def activation(self) -> str:
        """The kind of GELU that the towers run under."""
        return "quickgelu" if self._config.get("quick_gelu") else "gelu"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the image tower."""
        dtype: torch.dtype = next(self.model.visual.parameters()).dtype
        return dtype

    def load(self, checkpoint: Path) -> None:
        """Read the weights; position embeddings are brought to this input size. Raises BundleError."""
        load_open_clip(self.model, checkpoint)
        if isinstance(self.model.visual, open_clip.timm_model.TimmModel):
            # timm resizes position embeddings after loading, open_clip's own ViT while loading
            self.model.visual.set_input_size(self.input_size)

    def normalise(self, squashed: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [0, 255] -> the tower's input, in its precision."""
        return ((squashed.float() / 255.0 - self.pixel_mean) / self.pixel_std).to(self.dtype)

    def dense(self, normalised: Tensor) -> DenseFeatures:
        """(B, 3, S, S) normalised -> features at the taps."""
        output = self.model.visual.forward_intermediates(
            normalised,
            indices=[*self.indices, *self._memory_indices],
            normalize_intermediates=False,
            output_fmt="NCHW",
            stop_early=True,
            intermediates_only=True,
        )
        features = list(output["image_intermediates"])
        taps = features[: len(self.indices)]
        return DenseFeatures(taps, features[len(taps) :] or taps)

    def tap_channels(self) -> list[int]:
        """C_i of every tap; for towers of other libraries found by one forward of a grey image."""
        transformer = getattr(self.model.visual, "transformer", None)
        if transformer is not None:
            return [int(transformer.width)] * len(self.indices)
        known = getattr(getattr(self.model.visual, "trunk", None), "level_channels", None)
        if known is not None:
            return [int(known[index]) for index in self.indices]
        with torch.no_grad():
            device = self.pixel_mean.device
            grey = torch.zeros(1, 3, self.input_size, self.input_size, dtype=self.dtype, device=device)
            return [tap.shape[1] for tap in self.dense(grey).taps]

    @property
    def context_length(self) -> int:
        """Tokens of a sentence that the text tower reads; what is longer loses its end."""
        return int(self.tokenizer.context_length)

    def tokens(self, sentences: Sequence[str]) -> Tensor:
        """n sentences -> (n, context_length) int64."""
        tokens: Tensor = self.tokenizer(list(sentences))
        return tokens

    def cut(self, sentences: Sequence[str]) -> list[str]:
        """Those of which the text tower does not read the end."""
        longer = self.context_length + 1
        tokens, empty = (self.tokenizer(texts, context_length=longer) for texts in (list(sentences), [""]))
        padding = empty[0, -1]
        return [text for text, row in zip(sentences, tokens, strict=True) if row[-1] != padding]

    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """n sentences -> (n, D) float32 in the joint space, not normalised."""
        device = self.pixel_mean.device
        parts = []
        for start in range(0, len(sentences), SENTENCES_AT_ONCE):
            tokens = self.tokens(sentences[start : start + SENTENCES_AT_ONCE]).to(device)
            parts.append(self.model.encode_text(tokens, normalize=False).float())
        return torch.cat(parts)


def model_config(settings: ClipSettings, folder: Path) -> dict[str, Any]:
    """open_clip's configuration at the bundle's input size and activation. Raises BundleError."""
    if settings.config is not None:
        path = folder / settings.config
        try:
            config: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: not a readable model configuration: {error}") from error
    else:
        path = folder / "bundle.toml"
        config = open_clip.get_model_config(settings.architecture)
    if config is None:
        raise BundleError(f"{path}: clip.architecture {settings.architecture!r} is not known to open_clip")
    whole = isinstance(config, dict) and "embed_dim" in config
    if not whole or not all(isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise BundleError(f"{path}: a model configuration has embed_dim, vision_cfg and text_cfg")
    # weights come from the bundle alone: no tower may go to the network for its own
    config["vision_cfg"]["timm_model_pretrained"] = False
    config["text_cfg"]["hf_model_pretrained"] = False
    config["vision_cfg"]["image_size"] = settings.input_size
    if settings.activation is not None:
        if settings.activation == "gelu" and (settings.architecture or "").endswith("-quickgelu"):
            raise BundleError(f"{path}: clip.activation = 'gelu' contradicts {settings.architecture!r}")
        config["quick_gelu"] = settings.activation == "quickgelu"
    return config


def build_open_clip(config: dict[str, Any]) -> Any:
    """An open_clip model without weights. Raises BundleError if the configuration does not describe one."""
    arguments = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    custom = config.get("custom_text") or config["text_cfg"].get("hf_model_name")
    if config["text_cfg"].get("hf_model_name"):
        with_transformers()
    try:
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments)
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        raise BundleError(f"the CLIP configuration does not describe a model: {error}") from error
    return model.eval().requires_grad_(False)


def load_open_clip(model: Any, checkpoint: Path) -> None:
    """Load a published CLIP checkpoint into open_clip's model. Raises BundleError naming the file."""
    state = read_state_dict(checkpoint)
    for name in ("input_resolution", "context_length", "vocab_size"):
        state.pop(name, None)  # OpenAI's archives carry these as tensors
    state = convert_state_dict(model, state)
    for name in state:
        if name.endswith("positional_embedding"):
            state[name] = state[name].float()  # the CPU enlarges no halves, as which OpenAI publishes them
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    try:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BundleError(f"{checkpoint}: position embeddings do not fit: {error}") from error
    load_weights(model, state, checkpoint)


def tap_indices(visual: Any, taps: tuple[int, ...] | None) -> list[int]:
    """Positions for `forward_intermediates`, counted from 0. Raises BundleError if there is no such block."""
    trunk = getattr(visual, "trunk", visual)
    if hasattr(trunk, "pos_embed") or hasattr(visual, "transformer"):
        depth = len(trunk.blocks) if hasattr(trunk, "blocks") else len(visual.transformer.resblocks)
        quarters = (math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4))
        indices = [tap - 1 for tap in taps or dict.fromkeys(quarters)]  # of less than four blocks some coincide
    else:
        depth = len(trunk.feature_info) if hasattr(trunk, "feature_info") else 5
        indices = list(taps) if taps is not None else list(range(depth - 4, depth))
    if any(not 0 <= index < depth for index in indices) or sorted(set(indices)) != indices:
        raise BundleError(f"clip.taps {list(taps or ())} must rise and lie within the tower's {depth} blocks")
    return indices


def _tokenizer(settings: ClipSettings, config: dict[str, Any]) -> Any:
    text = config["text_cfg"]
    if text.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(settings.architecture or "")
    if settings.architecture and "siglip" in settings.architecture.lower():
        return open_clip.get_tokenizer(settings.architecture)
    return open_clip.SimpleTokenizer(
        context_length=text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})
    )
