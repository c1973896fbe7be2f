"""The image towers say what their libraries' own forward says, and frames are resized as their authors did it."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide

from flawline.config.errors import BundleError, ConfigError
from flawline.models.bundle import ClipSettings, SamSettings
from flawline.models.checkpoints import read_state_dict
from flawline.models.clip import DenseClip
from flawline.models.frames import FrameGeometry, fit, squash, upload
from flawline.models.sam import build_sam, load_sam
from flawline.models.towers import choose_device, choose_precision

CPU = torch.device("cpu")
SMALL_VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def redraw(module: torch.nn.Module, seed: int) -> None:
    """Every parameter non-zero: some start at zero, and a forward that drops them would pass otherwise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + 0.01)


@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
def test_dense_tokens_are_those_of_open_clips_blocks(tmp_path: Path, activation: str) -> None:
    (tmp_path / "clip.json").write_text(json.dumps(SMALL_VIT))
    settings = ClipSettings.model_validate(
        {"config": "clip.json", "checkpoint": "clip.pt", "input_size": 48, "taps": [1, 2, 4], "activation": activation}
    )
    source = open_clip.CLIP(**SMALL_VIT, quick_gelu=activation == "quickgelu")
    redraw(source, 1)
    torch.save(source.state_dict(), tmp_path / "clip.pt")
    dense = DenseClip(settings, tmp_path)
    dense.load(tmp_path / "clip.pt")
    seen: dict[int, torch.Tensor] = {}
    for number, block in enumerate(dense.model.visual.transformer.resblocks):
        block.register_forward_hook(lambda _m, _i, out, number=number: seen.__setitem__(number, out))
    image = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dense.model.encode_image(image)
        expected = {number: tokens.clone() for number, tokens in seen.items()}
        features = dense.dense(image)
    for tap, index in zip(features.taps, (0, 1, 3), strict=True):
        tokens = expected[index][:, 1:]
        torch.testing.assert_close(tap.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 90), (700, 300), (33, 33)])
def test_clips_frame_is_pils_bicubic_squash(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 255, (shape[0] // 8 + 1, shape[1] // 8 + 1, 3), np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BILINEAR))
    ours = squash(upload(picture, CPU), 48)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(picture).resize((48, 48), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(ours - theirs).max() <= 1.01  # PIL rounds between its two passes


@pytest.mark.parametrize("shape", [(60, 90), (90, 61), (64, 64)])
def test_sams_frame_is_segment_anythings(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    picture = np.asarray(
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).resize(shape[::-1], Image.Resampling.BILINEAR)
    )
    theirs = ResizeLongestSide(128).apply_image(picture).astype(np.float32)
    ours = fit(upload(picture, CPU), FrameGeometry(*shape, 32, 128))[0].permute(1, 2, 0).numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1.01


def test_a_published_sam_checkpoint_gives_segment_anythings_embedding(tmp_path: Path) -> None:
    theirs = sam_model_registry["vit_b"](checkpoint=None).eval()
    redraw(theirs, 5)
    torch.save(theirs.state_dict(), tmp_path / "sam_vit_b.pth")
    settings = SamSettings.model_validate({"architecture": "vit_b", "checkpoint": "sam_vit_b.pth"})
    ours = build_sam(settings)
    load_sam(ours, settings, tmp_path / "sam_vit_b.pth")
    picture = np.random.default_rng(6).integers(0, 255, (300, 500, 3), np.uint8)
    resized = ResizeLongestSide(1024).apply_image(picture)
    fitted = torch.as_tensor(resized).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = theirs.image_encoder(theirs.preprocess(fitted))
        torch.testing.assert_close(ours.image_encoder(ours.preprocess(fitted)), expected, rtol=1e-4, atol=1e-4)


def test_a_damaged_weight_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"PK\x03\x04 nothing of the kind")
    with pytest.raises(BundleError, match=r"weights\.pth"):
        read_state_dict(file)


@pytest.mark.parametrize("device", ["foo", "mps", "xpu", "meta", "cuda:x", "cuda:01", "cuda:-1", "cuda:99", "cpu\n"])
def test_a_device_that_is_not_there_is_a_wrong_configuration(device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        choose_device(device)


def test_devices_and_precisions_by_name() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    assert choose_precision("auto", CPU) is torch.float32
    assert choose_precision("bf16", CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="precision = 'fp8'"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(("native", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_emulated_bf16_is_not_chosen(native: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    cuda = torch.device("cuda", 0)
    assert choose_precision("auto", cuda) is chosen
    assert choose_precision("auto", cuda, "fp16") is torch.float16  # what a bundle has measured for itself
    assert choose_precision("auto", cuda, "fp32") is torch.float32
    assert choose_precision("bf16", cuda, "fp16") is torch.bfloat16  # the configuration has the last word
    assert choose_precision("auto", CPU, "fp16") is torch.float32


@pytest.mark.parametrize(
    ("architecture", "size", "taps", "channels", "grids"),
    [
        ("ViT-B-16", 224, [2, 5, 8, 11], [768] * 4, [14] * 4),
        ("ViT-B-16", 512, [2, 5, 8, 11], [768] * 4, [32] * 4),
        ("ViT-L-14-336", 518, [5, 11, 17, 23], [1024] * 4, [37] * 4),
        ("ViT-B-16-plus-240", 240, [2, 5, 8, 11], [896] * 4, [15] * 4),
        ("MobileCLIP-B", 224, [2, 5, 8, 11], [768] * 4, [14] * 4),
        ("MobileCLIP-S1", 256, [0, 1, 2, 3], [64, 128, 256, 512], [64, 32, 16, 8]),
    ],
)
def test_towers_of_every_kind_are_tapped_at_the_quarters_of_their_depth(
    tmp_path: Path, architecture: str, size: int, taps: list[int], channels: list[int], grids: list[int]
) -> None:
    """On the meta device: shapes only. A tower of convolutions has four stages for quarters, each coarser."""
    settings = ClipSettings.model_validate({"architecture": architecture, "checkpoint": "clip.pt", "input_size": size})
    with torch.device("meta"):
        dense = DenseClip(settings, tmp_path)
        features = dense.dense(torch.empty(2, 3, size, size))
    assert dense.indices == taps
    shapes = [tuple(tap.shape) for tap in features.taps]
    assert shapes == [(2, width, grid, grid) for width, grid in zip(channels, grids, strict=True)]
