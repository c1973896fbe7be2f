"""SAM's image encoder with its attention taken otherwise says what segment_anything's own says, and builds no bias."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flawline.config.errors import ConfigError
from flawline.models.sam_attention import FusedBlock, fuse_attention
from flawline.models.switches import Switches

pytestmark = pytest.mark.usefixtures("no_gradients")
WAYS = ("mask", "extended")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def encoder(grid: int, window: int, heads: int = 3, width: int = 48, depth: int = 4) -> ImageEncoderViT:
    """Global attention in every other block. Every parameter redrawn, and so that attention is far from even."""
    made = ImageEncoderViT(
        img_size=grid * 16,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=32,
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=tuple(range(1, depth, 2)),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    generator = torch.Generator().manual_seed(grid * 100 + window)
    for name, parameter in made.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        drawn = torch.randn(parameter.shape, generator=generator) * (1.0 if "rel_pos" in name else fan**-0.5)
        parameter.copy_(drawn + ("norm" in name and name.endswith("weight")))
    return made.eval().requires_grad_(False)


def fused(plain: ImageEncoderViT, how: str) -> ImageEncoderViT:
    """Another encoder with the same weights, its blocks replaced."""
    made = copy.deepcopy(plain)
    assert fuse_attention(made, how)
    assert all(isinstance(block, FusedBlock) for block in made.blocks)
    return made


def frames(grid: int, count: int) -> Tensor:
    return torch.randn(count, 3, grid * 16, grid * 16, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("grid", "window", "count"),
    # windows that fit, that need padding by one, by nearly all of a window, that are larger than the grid
    [(14, 7, 1), (13, 7, 2), (15, 7, 1), (10, 14, 3), (20, 14, 1), (32, 14, 1)],
)
def test_equal_to_segment_anything(how: str, grid: int, window: int, count: int) -> None:
    plain = encoder(grid, window)
    given = frames(grid, count)
    expected = plain(given)
    assert expected.std() > 0.1
    torch.testing.assert_close(fused(plain, how)(given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", WAYS)
def test_relative_positions_of_another_size_are_enlarged_as_segment_anything_does(how: str) -> None:
    """As where published tables are loaded into an encoder of another input size without being brought to it."""
    plain = encoder(13, 7)
    for block in plain.blocks:
        for name in ("rel_pos_h", "rel_pos_w"):
            table = getattr(block.attn, name)
            setattr(block.attn, name, nn.Parameter(table.repeat(2, 1)[: len(table) + 6].clone(), requires_grad=False))
    given = frames(13, 1)
    torch.testing.assert_close(fused(plain, how)(given), plain(given), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", WAYS)
def test_relative_positions_are_not_left_out(how: str) -> None:
    """Else the comparisons above could be passed by an attention that knows no positions."""
    plain = encoder(14, 7)
    without = copy.deepcopy(plain)
    for name, parameter in without.named_parameters():
        if "rel_pos" in name:
            parameter.zero_()
    given = frames(14, 1)
    assert (fused(without, how)(given) - plain(given)).abs().max() > 0.1


@pytest.mark.parametrize("how", WAYS)
def test_in_bf16_no_farther_from_float32_than_segment_anything_itself(how: str) -> None:
    plain = encoder(20, 14)
    given = frames(20, 2)
    exact = plain(given)
    half = copy.deepcopy(plain).to(torch.bfloat16)
    theirs = (half(given.bfloat16()).float() - exact).abs().mean()
    ours = (fused(half, how)(given.bfloat16()).float() - exact).abs().mean()
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("how", WAYS)
def test_the_weights_keep_their_names(how: str) -> None:
    plain = encoder(14, 7)
    ours, theirs = fused(plain, how).state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()


class Largest(TorchDispatchMode):
    """The most values that any one tensor had which was made meanwhile; of the host's kernels, inner ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        storages = [one.untyped_storage() for one in tree_leaves(made) if isinstance(one, Tensor)]
        self.numbers = max([self.numbers, *(storage.nbytes() // 4 for storage in storages)])
        return made


@pytest.mark.parametrize("how", WAYS)
def test_the_bias_of_a_whole_grid_is_never_built(how: str) -> None:
    grid, heads = 40, 3
    plain = encoder(grid, 14, heads=heads, depth=2)
    given = frames(grid, 1)
    whole = heads * (grid * grid) ** 2
    with Largest() as theirs:
        plain(given)
    assert theirs.numbers >= whole
    with Largest() as ours:
        fused(plain, how)(given)
    assert ours.numbers < whole / 4


def test_other_encoders_and_plain_are_left_alone() -> None:
    plain = encoder(14, 7)
    assert not fuse_attention(plain, "plain")
    assert not any(isinstance(block, FusedBlock) for block in plain.blocks)
    assert not fuse_attention(nn.Sequential(nn.Conv2d(3, 3, 1)), "auto")
    assert fuse_attention(plain, "auto")
    assert {block.how for block in plain.blocks} == {"mask"}  # on the CPU


def test_switches_are_read_from_the_environment_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(said: str) -> Switches:
        monkeypatch.setenv("FLAWLINE_SWITCHES", said)
        return Switches.from_environment()

    assert read("") == Switches()
    assert read(" attention=plain,") == Switches("plain")
    monkeypatch.delenv("FLAWLINE_SWITCHES")
    assert Switches.from_environment() == Switches()
    with pytest.raises(
        ConfigError, match=r"FLAWLINE_SWITCHES: 'speed' is no switch; there are attention, heap, batchnorm, graphs"
    ):
        read("speed=9")
    with pytest.raises(ConfigError, match=r"attention is one of auto, plain, mask, extended, not 'fast'"):
        read("attention=fast")


@needs_cuda
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_as_on_the_cpu(how: str, dtype: torch.dtype) -> None:
    plain = encoder(32, 14, heads=2, width=160)  # 80 channels a head, as ViT-H
    given = frames(32, 2)
    expected = plain(given)
    made = fused(copy.deepcopy(plain).to("cuda", dtype), how)(given.to("cuda", dtype)).float().cpu()
    if dtype == torch.float32:
        torch.testing.assert_close(made, expected, atol=5e-3, rtol=5e-3)
    else:
        theirs = copy.deepcopy(plain).to("cuda", dtype)(given.to("cuda", dtype)).float().cpu()
        assert (made - expected).abs().mean() < 1.2 * (theirs - expected).abs().mean()
