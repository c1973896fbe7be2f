"""Weight files as the world publishes them, with random values: they load, and mean what their publishers meant."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from segment_anything import sam_model_registry
from torch import Tensor, nn
from torch.nn import functional

from flawline.config.errors import BundleError
from flawline.models.bundle import ClipSettings, SamSettings
from flawline.models.checkpoints import load_weights, metadata, read_state_dict
from flawline.models.clip import DenseClip, model_config
from flawline.models.localise import AdapterLocaliser
from flawline.models.sam import build_sam, load_sam

CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SENTENCES = ["a photo of a flawless screw.", "a dark photo of the damaged metal_nut."]

pytestmark = pytest.mark.usefixtures("no_gradients")


def openai_names() -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of an archive of OpenAI's CLIP, of CONFIG's size."""
    names: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 32),
        "text_projection": (32, 32),
        "logit_scale": (),
        "visual.class_embedding": (64,),
        "visual.positional_embedding": (17, 64),
        "visual.proj": (64, 32),
        "visual.conv1.weight": (64, 3, 8, 8),
        "token_embedding.weight": (49408, 32),
    }
    for norm, width in (("visual.ln_pre", 64), ("visual.ln_post", 64), ("ln_final", 32)):
        names |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, layers, width in (("visual.transformer", 4, 64), ("transformer", 2, 32)):
        for layer in range(layers):
            block = f"{tower}.resblocks.{layer}"
            names |= {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
                f"{block}.attn.out_proj.weight": (width, width),
                f"{block}.attn.out_proj.bias": (width,),
                f"{block}.mlp.c_fc.weight": (4 * width, width),
                f"{block}.mlp.c_fc.bias": (4 * width,),
                f"{block}.mlp.c_proj.weight": (width, 4 * width),
                f"{block}.mlp.c_proj.bias": (width,),
            }
            for norm in ("ln_1", "ln_2"):
                names |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    return names


def drawn(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Values for every name, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in names.items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        value = torch.randn(shape, generator=generator) * (0.1 if len(shape) < 2 else fan_in**-0.5)
        values[name] = value + (1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "norm.weight")) else 0.01)
    return values


class Holder(nn.Module):
    """A module that holds tensors under dotted names, for scripting."""

    def forward(self, image: Tensor) -> Tensor:
        return image


def write_openai_archive(path: Path, values: dict[str, Tensor]) -> None:
    """As OpenAI's files: a TorchScript archive in fp16 that also carries three sizes as tensors."""
    root = Holder()
    for name, value in values.items():
        *parents, last = name.split(".")
        place: nn.Module = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, Holder())
            place = getattr(place, parent)
        place.register_parameter(last, nn.Parameter(value.half(), requires_grad=False))
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(number))
    torch.jit.save(torch.jit.script(root), str(path))  # type: ignore[no-untyped-call]


def dense_clip(folder: Path, size: int, activation: str) -> DenseClip:
    (folder / "clip.json").write_text(json.dumps(CONFIG))
    table = {"config": "clip.json", "checkpoint": "x", "input_size": size, "activation": activation}
    return DenseClip(ClipSettings.model_validate(table), folder)


def reference_clip(values: dict[str, Tensor], activation: str) -> Any:
    """open_clip's own model with these values."""
    model = open_clip.CLIP(**CONFIG, quick_gelu=activation == "quickgelu").eval()
    model.load_state_dict({name: value.half().float() for name, value in values.items()})
    return model


def image(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
def test_openais_clip_loads_from_the_archive_and_from_the_hub(tmp_path: Path, suffix: str, activation: str) -> None:
    values = drawn(openai_names(), 1)
    file = tmp_path / f"ViT{suffix}"
    if suffix == ".pt":
        write_openai_archive(file, values)
    else:
        save_file({name: value.half().float() for name, value in values.items()}, file)
    clip = dense_clip(tmp_path, 32, activation)
    clip.load(file)
    theirs = reference_clip(values, activation)
    assert clip.tap_channels() == [tap.shape[1] for tap in clip.dense(image(32)).taps]
    torch.testing.assert_close(clip.model.encode_image(image(32)), theirs.encode_image(image(32)), rtol=1e-4, atol=1e-5)
    tokens = open_clip.get_tokenizer("ViT-L-14-336")(SENTENCES)
    torch.testing.assert_close(clip.encode_text(SENTENCES), theirs.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_an_archive_in_half_precision_is_brought_to_another_input_size(tmp_path: Path) -> None:
    """Positions are enlarged as open_clip does it when it loads: bicubic, antialiased, the class token as it is."""
    values = drawn(openai_names(), 3)
    write_openai_archive(tmp_path / "clip.pt", values)
    clip = dense_clip(tmp_path, 48, "gelu")
    clip.load(tmp_path / "clip.pt")
    published = values["visual.positional_embedding"].half().float()
    grid = published[1:].T.reshape(1, 64, 4, 4)
    grid = functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([published[:1], grid.reshape(64, 36).T])
    torch.testing.assert_close(clip.model.visual.positional_embedding, expected, rtol=2e-3, atol=2e-3)


def test_the_activation_really_switches(tmp_path: Path) -> None:
    values = drawn(openai_names(), 4)
    save_file(values, tmp_path / "clip.safetensors")
    outputs = []
    for activation in ("gelu", "quickgelu"):
        clip = dense_clip(tmp_path, 32, activation)
        clip.load(tmp_path / "clip.safetensors")
        outputs.append((clip.dense(image(32)).taps[-1], clip.encode_text(SENTENCES)))
    for plain, quick in zip(*outputs, strict=True):
        assert (plain - quick).abs().max() > 1e-3  # both towers


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_sams_published_sizes_are_segment_anythings(name: str) -> None:
    """The same modules, names, shapes and attention windows; what they compute is shown with vit_b's weights."""
    with torch.device("meta"):
        theirs = sam_model_registry[name](checkpoint=None)
        ours = build_sam(SamSettings.model_validate({"architecture": name, "checkpoint": "x"}))
    own, published = ours.state_dict(), theirs.state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in published.items()}
    for one, other in zip(ours.image_encoder.blocks, theirs.image_encoder.blocks, strict=True):
        assert one.window_size == other.window_size
        assert (one.attn.num_heads, one.attn.scale) == (other.attn.num_heads, other.attn.scale)
        assert (one.attn.use_rel_pos, one.norm1.eps) == (other.attn.use_rel_pos, other.norm1.eps)
    assert ours.image_encoder.img_size == theirs.image_encoder.img_size == 1024
    assert ours.mask_threshold == theirs.mask_threshold


def interpolated(plane: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """(n, n) -> (size, size), bilinear with aligned corners, by its definition."""
    at = np.arange(size) * (plane.shape[0] - 1) / (size - 1)
    low = np.minimum(at.astype(int), plane.shape[0] - 2)
    part = at - low
    rows = plane[low] * (1 - part)[:, None] + plane[low + 1] * part[:, None]
    result: NDArray[np.float64] = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return result


@pytest.mark.parametrize("wrapped", [True, False])
def test_april_gans_layers_load_and_give_the_closed_form_map(tmp_path: Path, wrapped: bool) -> None:
    rng = np.random.default_rng(5)
    widths, dim, grid, size = [20, 20, 24, 24], 16, 5, 37
    state = {f"fc.{n}.weight": torch.from_numpy(rng.normal(size=(dim, w))).float() for n, w in enumerate(widths)}
    state |= {f"fc.{n}.bias": torch.from_numpy(rng.normal(size=dim)).float() for n in range(4)}
    torch.save({"trainable_linearlayer": state} if wrapped else state, tmp_path / "mvtec_pretrained.pth")
    layers = AdapterLocaliser(widths, dim, 100.0, False)
    load_weights(layers, read_state_dict(tmp_path / "mvtec_pretrained.pth"), tmp_path / "mvtec_pretrained.pth")
    tokens = [rng.normal(size=(2, grid * grid, w)) for w in widths]
    text = rng.normal(size=(dim, 2))
    text /= np.linalg.norm(text, axis=0)
    text[:, 1] = text[:, 0] + 0.05 * text[:, 1]  # near each other, as two sentences on one object are
    text /= np.linalg.norm(text, axis=0)

    expected = np.zeros((2, size, size))
    for number, each in enumerate(tokens):
        z = each @ state[f"fc.{number}.weight"].numpy().T.astype(float) + state[f"fc.{number}.bias"].numpy()
        logits = 100.0 * (z / np.linalg.norm(z, axis=2, keepdims=True)) @ text
        for row in range(2):
            normal, abnormal = (interpolated(logits[row, :, k].reshape(grid, grid), size) for k in (0, 1))
            expected[row] += np.exp(abnormal) / (np.exp(normal) + np.exp(abnormal)) / 4

    features = [
        torch.from_numpy(each).float().transpose(1, 2).reshape(2, -1, grid, grid).contiguous() for each in tokens
    ]
    found = layers(features, torch.from_numpy(text).float(), size).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert expected.std() > 0.05


@pytest.mark.parametrize(
    "state",
    [
        {"fc.0.weight": torch.ones(16, 20)},
        {
            f"fc.{n}.{kind}": torch.ones((16, 21) if kind == "weight" else 16)
            for n in range(4)
            for kind in ("weight", "bias")
        },
    ],
)
def test_layers_of_another_model_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"trainable_linearlayer": state}, tmp_path / "other.pth")
    layers = AdapterLocaliser([20] * 4, 16, 100.0, False)
    with pytest.raises(BundleError, match=r"other\.pth"):
        load_weights(layers, read_state_dict(tmp_path / "other.pth"), tmp_path / "other.pth")


class Runs:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("run",))


def test_an_archive_that_is_damaged_anywhere_is_named(tmp_path: Path) -> None:
    """A bundle's files have checksums; a file of `--adapter` has none."""
    whole = tmp_path / "whole.pth"
    torch.save({"fc.0.weight": torch.ones(3, 4), "fc.0.bias": torch.ones(4)}, whole)
    content = whole.read_bytes()
    damaged = tmp_path / "damaged.pth"
    refused = 0
    for place in range(0, len(content), 7):
        spoilt = bytearray(content)
        spoilt[place : place + 3] = b"\xff\x00\xff"
        damaged.write_bytes(spoilt)
        try:
            read_state_dict(damaged)
        except BundleError as error:
            assert str(damaged) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 20


def test_weights_are_told_by_their_content_where_the_name_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "layers"
    save_file({"fc.0.weight": torch.ones(3, 4)}, path, {"activation": "gelu"})
    assert torch.equal(read_state_dict(path)["fc.0.weight"], torch.ones(3, 4))
    assert metadata(path) == {"activation": "gelu"}
    assert metadata(tmp_path / "nothing") == {}


def test_an_architecture_of_quickgelu_runs_under_it(tmp_path: Path) -> None:
    def quick(architecture: str, activation: Literal["gelu", "quickgelu"] | None) -> bool:
        settings = ClipSettings(architecture=architecture, checkpoint="x", input_size=224, activation=activation)
        return bool(model_config(settings, tmp_path).get("quick_gelu"))

    assert quick("ViT-B-32-quickgelu", None)
    assert not quick("ViT-B-32", None)
    assert quick("ViT-B-32", "quickgelu")
    with pytest.raises(BundleError, match="contradicts"):
        quick("ViT-B-32-quickgelu", "gelu")


def test_a_pickle_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Runs()}, tmp_path / "evil.pth")
    with pytest.raises(BundleError, match=r"evil\.pth"):
        read_state_dict(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


def test_sams_checkpoint_is_not_mobile_sams(tmp_path: Path) -> None:
    torch.save({"image_encoder.pos_embed": torch.ones(1, 64, 64, 768)}, tmp_path / "sam.pth")
    settings = SamSettings.model_validate({"architecture": "vit_t", "checkpoint": "sam.pth", "input_size": 256})
    with pytest.raises(BundleError, match=r"sam\.pth: does not fit"):
        load_sam(build_sam(settings), settings, tmp_path / "sam.pth")
