"""Folding batch norms changes how fast the small encoders are and nothing that they say."""

import copy
from pathlib import Path

import torch
from tiny_bundle import write_tiny_bundle
from torch import nn

from flawline.models.fold import fold_batch_norms, fold_trunks
from flawline.models.pyramid import Lite0Pyramid
from flawline.models.sam_small import Lite0SamEncoder, TinyVitSamEncoder
from flawline.models.switches import Switches
from flawline.models.towers import load_towers


def lived_in(module: nn.Module) -> nn.Module:
    """With batch norms that have statistics of their own, as trained ones have."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.running_mean, -0.5, 0.5),
                (norm.running_var, 0.5, 2.0),
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.5, 0.5),
            ):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return module.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@torch.no_grad()
def test_the_trunk_says_the_same_for_clip_and_for_sam() -> None:
    trunk = lived_in(Lite0Pyramid())
    sam = Lite0SamEncoder(img_size=128, trunk=trunk.backbone).eval()
    picture = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    last, levels = trunk.forward_intermediates(picture, indices=(0, 1, 2, 3, 4, 5))
    expected = [last, *levels, sam(picture)]
    many = norms(trunk)
    assert many > 40
    assert fold_trunks(trunk, sam) == many
    assert norms(trunk) == 0
    assert fold_trunks(trunk, sam) == 0
    last, levels = trunk.forward_intermediates(picture, indices=(0, 1, 2, 3, 4, 5))
    for mine, theirs in zip([last, *levels, sam(picture)], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@torch.no_grad()
def test_tiny_vit_says_the_same() -> None:
    plain = lived_in(TinyVitSamEncoder(img_size=256))
    folded = copy.deepcopy(plain)
    assert fold_trunks(None, folded) == norms(plain) > 20
    assert norms(folded) == 0
    picture = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(folded(picture), plain(picture), rtol=1e-3, atol=1e-3)


def test_only_a_norm_right_after_its_convolution_is_folded() -> None:
    apart = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    assert fold_batch_norms(apart) == 0
    assert norms(apart) == 1


def test_the_switch_decides(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    folded, plain = (
        load_towers(bundle, "cpu", switches=Switches.parse([f"batchnorm={way}"], "test")) for way in ("folded", "plain")
    )
    assert norms(folded.sam) == 0
    assert norms(plain.sam) > 40
