"""MobileSAM's published tensors, read by a TinyViT of our own: functions over tensors by their published names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flawline.models.bundle import SamSettings
from flawline.models.sam import build_sam, load_sam

WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
State = dict[str, Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")


def encoder_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the image encoder's tensors in mobile_sam.pt."""
    names: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, into: int, out: int, kernel: int, groups: int = 1) -> None:
        names[f"{name}.c.weight"] = (out, into // groups, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            names[f"{name}.bn.{part}"] = (out,)
        names[f"{name}.bn.num_batches_tracked"] = ()

    def affine(name: str, shape: tuple[int, ...]) -> None:
        names[f"{name}.weight"], names[f"{name}.bias"] = shape, shape[:1]

    convolution("patch_embed.seq.0", 3, 32, 3)
    convolution("patch_embed.seq.2", 32, 64, 3)
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}"
            if stage == 0:
                convolution(f"{block}.conv1", width, 4 * width, 1)
                convolution(f"{block}.conv2", 4 * width, 4 * width, 3, 4 * width)
                convolution(f"{block}.conv3", 4 * width, width, 1)
                continue
            names[f"{block}.attn.attention_biases"] = (HEADS[stage], WINDOWS[stage] ** 2)
            affine(f"{block}.attn.norm", (width,))
            affine(f"{block}.attn.qkv", (3 * width, width))
            affine(f"{block}.attn.proj", (width, width))
            affine(f"{block}.mlp.norm", (width,))
            affine(f"{block}.mlp.fc1", (4 * width, width))
            affine(f"{block}.mlp.fc2", (width, 4 * width))
            convolution(f"{block}.local_conv", width, width, 3, width)
        if stage < 3:
            following = WIDTHS[stage + 1]
            convolution(f"layers.{stage}.downsample.conv1", width, following, 1)
            convolution(f"layers.{stage}.downsample.conv2", following, following, 3, following)
            convolution(f"layers.{stage}.downsample.conv3", following, following, 1)
    affine("norm_head", (320,))
    affine("head", (1000, 320))
    names["neck.0.weight"] = (256, 320, 1, 1)
    affine("neck.1", (256,))
    names["neck.2.weight"] = (256, 256, 3, 3)
    affine("neck.3", (256,))
    return names


def drawn(names: dict[str, tuple[int, ...]]) -> State:
    """Values that keep activations alive through the depth; none is zero."""
    generator = torch.Generator().manual_seed(7)
    state: State = {}
    for name, shape in names.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif name.endswith("running_var"):
            state[name] = noise.abs() + 0.5
        elif len(shape) > 1 and not name.endswith("attention_biases"):
            state[name] = noise / np.sqrt(np.prod(shape[1:]))
        elif name.endswith((".bias", "running_mean", "attention_biases")):
            state[name] = 0.2 * noise
        else:
            state[name] = 1.0 + 0.2 * noise
    return state


def convolve(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.c.weight"]
    groups = x.shape[1] // weight.shape[1]
    x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    scale = state[f"{name}.bn.weight"] / torch.sqrt(state[f"{name}.bn.running_var"] + 1e-5)
    shift = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def normalise(state: State, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attend(state: State, name: str, tokens: Tensor, heads: int, window: int) -> Tensor:
    """(window^2, C) tokens of one window -> the same, with a bias by the distance of rows and of columns."""
    count, width = tokens.shape
    each = width // heads
    mixed = linear(state, f"{name}.qkv", normalise(state, f"{name}.norm", tokens)).view(count, heads, 3 * each)
    query, key, value = mixed.split(each, dim=2)
    rows, columns = torch.arange(count) // window, torch.arange(count) % window
    apart = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
    out = []
    for head in range(heads):
        bias = state[f"{name}.attention_biases"][head][apart]
        weights = (query[:, head] @ key[:, head].T / each**0.5 + bias).softmax(dim=-1)
        out.append(weights @ value[:, head])
    return linear(state, f"{name}.proj", torch.cat(out, dim=1))


def attention_block(state: State, name: str, x: Tensor, heads: int, window: int) -> Tensor:
    """(C, H, W) -> the same: windows (the last ones filled up with zeros), local convolution, MLP."""
    width, height, columns = x.shape
    padded = functional.pad(x, (0, -columns % window, 0, -height % window))
    seen = torch.zeros_like(padded)
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            part = padded[:, top : top + window, left : left + window]
            answer = attend(state, f"{name}.attn", part.reshape(width, -1).T, heads, window)
            seen[:, top : top + window, left : left + window] = answer.T.reshape(width, window, window)
    x = x + seen[:, :height, :columns]
    x = convolve(state, f"{name}.local_conv", x[None])[0]
    tokens = x.reshape(width, -1).T
    hidden = functional.gelu(linear(state, f"{name}.mlp.fc1", normalise(state, f"{name}.mlp.norm", tokens)))
    return x + linear(state, f"{name}.mlp.fc2", hidden).T.reshape(x.shape)


def tiny_vit(state: State, x: Tensor) -> Tensor:
    """(1, 3, P, P) -> (1, 256, P/16, P/16), as MobileSAM computes it: the last merging does not stride."""
    x = functional.gelu(convolve(state, "patch_embed.seq.0", x, 2))
    x = convolve(state, "patch_embed.seq.2", x, 2)
    for stage, depth in enumerate(DEPTHS):
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}"
            if stage == 0:
                y = functional.gelu(convolve(state, f"{block}.conv1", x))
                y = functional.gelu(convolve(state, f"{block}.conv2", y))
                x = functional.gelu(x + convolve(state, f"{block}.conv3", y))
            else:
                x = attention_block(state, block, x[0], HEADS[stage], WINDOWS[stage])[None]
        if stage < 3:
            merge = f"layers.{stage}.downsample"
            x = functional.gelu(convolve(state, f"{merge}.conv1", x))
            x = functional.gelu(convolve(state, f"{merge}.conv2", x, 1 if stage == 2 else 2))
            x = convolve(state, f"{merge}.conv3", x)
    for weight, norm, padding in (("neck.0", "neck.1", 0), ("neck.2", "neck.3", 1)):
        x = functional.conv2d(x, state[f"{weight}.weight"], padding=padding)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        x = x * state[f"{norm}.weight"][:, None, None] + state[f"{norm}.bias"][:, None, None]
    return x


def test_a_published_checkpoint_gives_mobile_sams_embedding(tmp_path: Path) -> None:
    settings = SamSettings.model_validate({"architecture": "vit_t", "checkpoint": "mobile_sam.pt", "input_size": 256})
    ours = build_sam(settings)
    encoder = drawn(encoder_names())
    state = {f"image_encoder.{name}": value for name, value in encoder.items()}
    rest = {name: value for name, value in ours.state_dict().items() if not name.startswith("image_encoder.")}
    torch.save(state | rest, tmp_path / "mobile_sam.pt")
    load_sam(ours, settings, tmp_path / "mobile_sam.pt")
    picture = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(8))
    expected = tiny_vit(encoder, picture)
    found = ours.image_encoder(picture)
    assert found.shape == (1, 256, 16, 16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


def test_the_published_names_are_all_that_the_encoder_needs() -> None:
    """The classifier and its norm are in the file, and not used."""
    names = encoder_names()
    used = sum(
        int(np.prod(shape))
        for name, shape in names.items()
        if "running" not in name and "num_batches" not in name and not name.startswith(("head", "norm_head"))
    )
    settings = SamSettings.model_validate({"architecture": "vit_t", "checkpoint": "x", "input_size": 256})
    assert used == sum(parameter.numel() for parameter in build_sam(settings).image_encoder.parameters())
