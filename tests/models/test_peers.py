"""Published methods beside ours: their formulas written down a second time, plainly, and the command that runs them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter
from test_towers import redraw
from tiny_bundle import CLIP_CONFIG, write_parts, write_tiny_bundle
from torch import Tensor
from torch.nn import functional

from flawline.agent.cli_workbench import evaluate
from flawline.config.errors import BundleError, ConfigError
from flawline.models.bundle import open_bundle
from flawline.models.clip import DenseClip
from flawline.models.peers import (
    SDP_TEMPLATES,
    PeerSpec,
    bilinear_positions,
    learnt_text,
    load_peers,
    smoothed,
)
from flawline.models.two_path import check_tower, joint, staged, summed

pytestmark = pytest.mark.usefixtures("no_gradients")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    vision = {**CLIP_CONFIG["vision_cfg"], "layers": 12}
    made = open_clip.CLIP(**{**CLIP_CONFIG, "vision_cfg": vision}).eval()
    redraw(made, 3)
    return made


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def heads_of(block: Any, normed: Tensor, which: str) -> Tensor:
    """Attention written out, head by head: `qkv` or `vvv`."""
    width, heads = normed.shape[-1], block.attn.num_heads
    each = width // heads
    found = []
    for head in range(heads):
        parts = []
        for letter in which:
            start = "qkv".index(letter) * width + head * each
            weight = block.attn.in_proj_weight[start : start + each]
            parts.append(normed @ weight.T + block.attn.in_proj_bias[start : start + each])
        shares = (parts[0] @ parts[1].transpose(1, 2) / each**0.5).softmax(-1)
        found.append(shares @ parts[2])
    return torch.cat(found, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias


def released(visual: Any, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """CLIP-AD's tower as released, with its sums in place: tokens stored at a stage change in the next block."""
    plain, dense = [], []
    own = visual._embeds(image)
    second: Tensor | None = None
    for number, block in enumerate(visual.transformer.resblocks):
        normed = block.ln_1(own)
        gathered = heads_of(block, normed, "vvv")
        second = gathered if number in (0, 3, 6, 9) else second + gathered
        own += heads_of(block, normed, "qkv")  # in place: what was stored before is the same tensor
        own = own + block.mlp(block.ln_2(own))
        if number in (2, 5, 8, 11):
            plain.append(own)
            dense.append(second)
    return plain, dense


def test_stages_are_those_of_clip_ads_released_code(model: Any, images: Tensor) -> None:
    plain, dense = released(model.visual, images)
    stages = staged(model.visual, images)
    assert len(stages) == 4
    for stage, one, two in zip(stages, plain, dense, strict=True):
        torch.testing.assert_close(stage.plain, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stage.dense, two, rtol=1e-4, atol=1e-5)
    # the last stage's own path is the tower's: its pooled feature comes out
    pooled = functional.normalize(model.encode_image(images), dim=-1)
    torch.testing.assert_close(joint(model.visual, stages[-1].plain[:, 0]), pooled, rtol=1e-4, atol=1e-5)


def test_anomalyclips_path_starts_before_its_first_block(model: Any, images: Tensor) -> None:
    visual = model.visual
    own = visual._embeds(images)
    for number, block in enumerate(visual.transformer.resblocks):
        if number == 5:
            second = own
        if number >= 5:
            second = second + heads_of(block, block.ln_1(own), "vvv")
        own = block(own)
    torch.testing.assert_close(summed(visual, images, 7), second, rtol=1e-4, atol=1e-5)


def write_learner(path: Path, model: Any, deep: int = 2, scale: float = 0.05) -> dict[str, Tensor]:
    """A prompt learner as AnomalyCLIP publishes it, of this text tower: its words are those of two sentences."""
    table: dict[str, Tensor] = {}
    for sign, sentence in (
        ("pos", "a b c d e f g h i j k l object."),
        ("neg", "m n o p q r s t u v w x damaged object."),
    ):
        tokens = open_clip.tokenize(sentence)
        words = model.token_embedding(tokens)
        table[f"ctx_{sign}"] = words[:, None, 1:13].clone()
        table[f"token_prefix_{sign}"] = words[:, None, :1].clone()
        table[f"token_suffix_{sign}"] = words[:, None, 13:].clone()
        table[f"tokenized_prompts_{sign}"] = tokens[:, None]
    width = model.token_embedding.weight.shape[1]
    generator = torch.Generator().manual_seed(5)
    for number in range(deep):
        table[f"compound_prompts_text.{number}"] = torch.randn(4, width, generator=generator) * scale
        table[f"compound_prompt_projections.{number}.weight"] = torch.randn(896, width)
    torch.save({"prompt_learner": table}, path)
    return table


def test_learnt_words_that_are_a_sentence_say_what_the_sentence_says(model: Any, tmp_path: Path) -> None:
    learner = write_learner(tmp_path / "words.pth", model, deep=0)
    text = learnt_text(model, learner, tmp_path)
    sentences = ["a b c d e f g h i j k l object.", "m n o p q r s t u v w x damaged object."]
    expected = functional.normalize(model.encode_text(open_clip.tokenize(sentences)), dim=-1)
    torch.testing.assert_close(text.T, expected, rtol=1e-4, atol=1e-5)


def test_deep_words_take_the_places_from_the_second_layer_on(tmp_path: Path) -> None:
    model: Any = open_clip.CLIP(**{**CLIP_CONFIG, "text_cfg": {**CLIP_CONFIG["text_cfg"], "layers": 4}}).eval()
    redraw(model, 6)
    learner = write_learner(tmp_path / "words.pth", model, deep=2, scale=0.5)

    def put(number: int) -> Any:
        def hook(_block: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens = given[0].clone()
            tokens[:, 1:5] = learner[f"compound_prompts_text.{number - 1}"].half().float()
            return (tokens, *given[1:])

        return hook

    plain = model.encode_text(open_clip.tokenize("a b c d e f g h i j k l object."))
    for number in (1, 2):
        model.transformer.resblocks[number].register_forward_pre_hook(put(number))
    expected = model.encode_text(open_clip.tokenize("a b c d e f g h i j k l object."))
    for block in model.transformer.resblocks:
        block._forward_pre_hooks.clear()
    found = learnt_text(model, learner, tmp_path)[:, 0]
    torch.testing.assert_close(found, functional.normalize(expected, dim=-1)[0], rtol=1e-4, atol=1e-5)
    assert (found - functional.normalize(plain, dim=-1)[0]).abs().max() > 1e-3


def test_smoothing_is_scipys_and_templates_are_the_published_ones() -> None:
    planes = torch.rand(2, 60, 60)
    for plane, smooth in zip(planes, smoothed(planes, 8.0), strict=True):
        expected = torch.from_numpy(gaussian_filter(plane.double().numpy(), 8.0)).float()
        torch.testing.assert_close(smooth, expected, rtol=0, atol=1e-5)
    assert len(set(SDP_TEMPLATES)) == 22
    assert {"a cropped photo of the {}.", "a photo of a small {}.", "a photo of the {} for anomaly detection."} <= set(
        SDP_TEMPLATES
    )
    positions = torch.rand(1 + 9, 4)
    assert torch.equal(bilinear_positions(positions, (3, 3)), positions)
    assert bilinear_positions(positions, (5, 5)).shape == (26, 4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def layers_file(path: Path) -> Path:
    generator = torch.Generator().manual_seed(8)
    table = {}
    for number in range(4):
        table[f"fc.{number}.weight"] = torch.randn(32, 64, generator=generator)
        table[f"fc.{number}.bias"] = torch.randn(32, generator=generator)
    torch.save({"linear_layers": table}, path)
    return path


def test_maps_follow_the_formulas(bundle: Path, tmp_path: Path) -> None:
    """SDP and SDP+ from the released code's tokens; one picture, in the method's own frame."""
    specs = [
        PeerSpec.parse(f"sdp={bundle}"),
        PeerSpec.parse(f"sdp_plus={bundle},{layers_file(tmp_path / 'layers.pth')}"),
    ]
    peers: Any = load_peers(specs, CPU, "mvtec")
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    sdp, plus = (peers[name](pixels, "plate")[0] for name in ("sdp", "sdp_plus"))
    clip, text = peers["sdp"]._clip, peers["sdp"]._text("plate")
    visual = clip.model.visual
    total, layers = torch.zeros(8, 8), torch.zeros(64, 64)
    fc = torch.load(tmp_path / "layers.pth", weights_only=True)["linear_layers"]
    for number, stage in enumerate(staged(visual, clip.normalise(pixels))):  # four blocks: one a stage
        weight = 2 * (joint(visual, stage.plain[0, 0]) @ text).softmax(-1)
        for place in range(64):
            patch = joint(visual, stage.dense[0, 1 + place])
            total[place // 8, place % 8] += 0.5 * (weight[1] * patch @ text[:, 1] - weight[0] * patch @ text[:, 0])
        tokens = stage.plain[0, 1:] @ fc[f"fc.{number}.weight"].T + fc[f"fc.{number}.bias"]
        logits = (100 * functional.normalize(tokens, dim=-1) @ text).T.reshape(1, 2, 8, 8)
        layers += functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=True).softmax(1)[0, 1]
    plain = functional.interpolate(total[None, None], (64, 64), mode="bilinear", align_corners=False)[0, 0]

    def smooth(plane: Tensor) -> Tensor:
        return torch.from_numpy(gaussian_filter(plane.double().numpy(), 8.0)).float()

    torch.testing.assert_close(8 * sdp - 4, smooth(plain), rtol=0, atol=1e-4)
    torch.testing.assert_close(12 * plus - 4, smooth(plain + layers), rtol=0, atol=1e-3)


def test_each_runs_under_the_activation_it_was_trained_with(bundle: Path, tmp_path: Path) -> None:
    """Whatever the bundle's own layers were trained under."""
    quick = write_tiny_bundle(tmp_path / "quick", activation="quickgelu")
    for clip in (bundle, quick):
        opened = open_bundle(clip)
        write_learner(tmp_path / "words.pth", DenseClip(opened.manifest.clip, opened.folder).model, deep=1)
        specs = [f"sdp={clip}", f"anomalyclip={clip},{tmp_path / 'words.pth'}"]
        peers: Any = load_peers([PeerSpec.parse(spec) for spec in specs], CPU, "mvtec")
        assert (peers["sdp"]._clip.activation, peers["anomalyclip"]._clip.activation) == ("gelu", "quickgelu")


def test_evaluate_runs_them_beside_ours(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    clip = DenseClip(opened.manifest.clip, opened.folder)
    clip.load(opened.path("clip.safetensors"))
    write_learner(tmp_path / "words.pth", clip.model, deep=1)
    root = write_parts(tmp_path / "data", good=2, defective=2)
    arguments = ["--dataset", "folder", "--root", str(root), "--bundle", str(bundle), "--device", "cpu", "--size", "64"]
    arguments += ["--peer", f"sdp={bundle}", "--peer", f"anomalyclip={bundle},{tmp_path / 'words.pth'}"]
    done = CliRunner().invoke(evaluate, [*arguments, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(content["rows"]) == {"sdp", "anomalyclip", "flawline"}
    for row in content["rows"].values():
        assert 0.0 <= row["mean"]["pixel_auroc"] <= 1.0
    scores = {key: row["mean"]["pixel_auroc"] for key, row in content["rows"].items()}
    assert len(set(scores.values())) == 3, "three methods, three maps"


def test_what_does_not_fit_is_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    for text, reason in (
        (f"winclip={bundle}", "not known"),
        ("sdp", "METHOD=BUNDLE"),
        (f"sdp_plus={bundle}", "needs its checkpoint"),
        (f"sdp={bundle},x.pth", "has no checkpoint"),
    ):
        with pytest.raises(ConfigError, match=reason):
            PeerSpec.parse(text)
    root = write_parts(tmp_path / "data")
    arguments = ["--dataset", "folder", "--root", str(root), "--peer", "winclip=x", "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"--peer winclip=x: 'winclip' is not known"):
        CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
    with pytest.raises(BundleError, match="ctx_pos is missing"):
        load_peers([PeerSpec.parse(f"anomalyclip={bundle},{layers_file(tmp_path / 'l.pth')}")], CPU, "mvtec")
    with pytest.raises(BundleError, match="ViT image tower"):
        check_tower(torch.nn.Identity(), "--peer sdp=demo")
