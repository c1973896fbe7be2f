"""`flawline bench`: the shape of its answer, and that the reference does the work that it is timed for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_bundle import write_tiny_bundle

from flawline.agent.cli import cli
from flawline.config.errors import ConfigError
from flawline.config.recipe import PromptSettings, Recipe
from flawline.models import bench_variants
from flawline.models.agreement import agreement, mask_iou
from flawline.models.bench import bench, texture
from flawline.models.bench_reference import PlainPipeline
from flawline.models.bundle import open_bundle
from flawline.models.graphs import Graphs
from flawline.models.inspector import Inspector
from flawline.models.random_towers import random_bundle, random_towers
from flawline.models.results import InspectionResult
from flawline.models.sam_attention import FusedBlock
from flawline.models.switches import Switches
from flawline.models.towers import Towers, load_towers


def test_json_has_stage_times_reference_and_ratio(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    answer = CliRunner().invoke(
        cli, ["bench", "--bundle", str(bundle), "--device", "cpu", "--size", "90x70", "--runs", "2", "--json"]
    )
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result["machine"]["device"] == "cpu"
    assert result["picture"] == [70, 90]
    ours = result["flawline_ms"]
    assert set(ours) >= {"clean", "suspicious", "clip", "encode", "prompt", "cascade", "total"}
    assert all(value > 0 for value in ours.values())
    assert result["ratio"] == pytest.approx(result["reference_ms"] / ours["suspicious"], rel=1e-2)
    assert result["ppg_cps_ms"] == pytest.approx(ours["prompt"] + ours["cascade"], abs=0.01)
    assert all(result["p99_ms"][kind] >= ours[kind] for kind in ("clean", "suspicious"))
    rates = result["frames_per_second"]
    assert set(rates) == {"clean", "suspicious", "day", "batch_clean", "batch_suspicious"}
    assert all(value > 0 for value in rates.values())
    assert result["points"] == {"positive": 3, "negative": 3}
    assert result["switches"] == Switches().as_dict()
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "ratio_bf16" not in result  # there is no CUDA device


def test_a_picture_of_ones_own_and_a_table(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    Image.fromarray(texture(50, 60)).save(tmp_path / "part.png")
    arguments = ["bench", "--bundle", str(bundle), "--device", "cpu", "--runs", "1"]
    answer = CliRunner().invoke(cli, [*arguments, "--image", str(tmp_path / "part.png")])
    assert answer.exit_code == 0, answer.output
    assert "60 x 50 px, float32, median of 1 runs" in answer.stdout
    assert "ratio" in answer.stdout
    wrong = CliRunner().invoke(cli, [*arguments, "--size", "wide"])
    assert wrong.exit_code == 2
    assert "--size" in wrong.output


def test_the_reference_runs_clip_once_and_the_decoder_three_times(tmp_path: Path) -> None:
    inspector = Inspector.load(write_tiny_bundle(tmp_path / "tiny"), "cpu")
    picture = texture(70, 90)
    recipe = Recipe(prompt=PromptSettings(region_threshold=0.0))
    trace = inspector.trace(picture, recipe)
    calls: list[tuple[str, bool]] = []
    towers = inspector.towers
    towers.clip.model.visual.register_forward_hook(lambda *_: calls.append(("clip", True)))
    towers.sam.image_encoder.register_forward_hook(lambda *_: calls.append(("encoder", True)))
    towers.sam.prompt_encoder.register_forward_hook(
        lambda _module, _given, made, **_: calls.append(("prompt", made[0].shape[1] > 0))
    )
    towers.sam.mask_decoder.register_forward_hook(lambda *_: calls.append(("decoder", True)))
    timing = PlainPipeline(towers)(picture, trace.points, trace.labels)
    assert [name for name, _ in calls] == ["clip", "encoder"] + ["prompt", "decoder"] * 3
    assert set(timing.stages) == {"clip", "encode", "cascade"}
    assert timing.whole == pytest.approx(sum(timing.stages.values()))


def test_the_last_mask_of_both_is_the_same(tmp_path: Path) -> None:
    """Else the ratio would compare different work."""
    inspector = Inspector.load(write_tiny_bundle(tmp_path / "tiny"), "cpu")
    picture = texture(70, 90)
    trace = inspector.trace(picture, Recipe(prompt=PromptSettings(region_threshold=0.0)))
    towers = inspector.towers
    seen: list[torch.Tensor] = []
    towers.sam.mask_decoder.register_forward_hook(lambda _module, _given, made: seen.append(made[0]))
    PlainPipeline(towers)(picture, trace.points, trace.labels)
    assert len(seen) == 3
    for stage, masks in zip(trace.stages, seen, strict=True):
        np.testing.assert_allclose(masks[0, stage.index].numpy(), stage.logits, atol=1e-4)


def test_the_reference_under_autocast_finds_nearly_the_same(tmp_path: Path) -> None:
    """On CUDA the reference is measured so too; what it computes is the same everywhere."""
    inspector = Inspector.load(write_tiny_bundle(tmp_path / "tiny"), "cpu")
    picture = texture(70, 90)
    trace = inspector.trace(picture, Recipe(prompt=PromptSettings(region_threshold=0.0)))
    towers = inspector.towers
    seen: list[torch.Tensor] = []
    towers.sam.mask_decoder.register_forward_hook(lambda _module, _given, made: seen.append(made[0].float()))
    PlainPipeline(towers)(picture, trace.points, trace.labels)
    PlainPipeline(towers, torch.bfloat16)(picture, trace.points, trace.labels)
    assert len(seen) == 6
    for exact, near in zip(seen[:3], seen[3:], strict=True):
        difference = (exact - near).abs().mean()
        assert 0.0 < difference < 0.1 * exact.abs().mean()


@pytest.mark.slow
def test_random_models_of_published_sizes_need_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small CLIP here; `--random` takes ViT-L-14-336 at 518 px."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    described = random_bundle("vit_b", 256, "ViT-S-32", 224)
    made: list[Switches] = []

    def source(precision: str, switches: Switches) -> object:
        made.append(switches)
        return random_towers(described, "cpu", precision, switches)

    result = bench(source, "fp32", texture(60, 80), runs=1)  # type: ignore[arg-type]
    assert result["bundle"] == "random-vit_b-256"
    assert result["points"] == {"positive": 3, "negative": 3}
    # the reference has models of its own, with segment_anything's attention
    assert [switches.attention for switches in made] == ["auto", "plain"]
    fused, again = (random_towers(described, "cpu", "fp32", switches) for switches in made)
    kinds = [isinstance(towers.sam.image_encoder.blocks[0], FusedBlock) for towers in (fused, again)]
    assert kinds == [True, False]
    for name, tensor in fused.sam.state_dict().items():
        assert torch.equal(tensor, again.sam.state_dict()[name]), name
    assert not (fused.clip.model.visual.conv1.weight == 0).any()


def test_sams_variants_are_timed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vit-h", "vit-b"):
        write_tiny_bundle(tmp_path / "bundles" / name)
    monkeypatch.setenv("FLAWLINE_BUNDLES", str(tmp_path / "bundles"))
    for seed in (1, 2):
        Image.fromarray(texture(60, 80, seed)).save(tmp_path / f"{seed}.png")
    arguments = ["bench", "--variants", "--device", "cpu", "--runs", "1", "--json"]
    answer = CliRunner().invoke(cli, [*arguments, "--pictures", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout.splitlines()[-1])["variants"]
    assert [row["variant"] for row in rows] == ["vit-h 128", "vit-h 512", "vit-b 128", "vit-b 512"]
    assert rows[0]["agreement"] == rows[2]["agreement"]  # the same weights
    assert rows[0]["agreement"]["held"]
    assert rows[1]["agreement"]["largest_map_difference"] > 0.0
    assert rows[1]["encode_ms"] > rows[0]["encode_ms"]  # sixteen times the pixels
    monkeypatch.setenv("FLAWLINE_BUNDLES", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    nothing = CliRunner().invoke(cli, arguments)
    assert nothing.exit_code != 0
    assert "--variants: none of vit-h" in str(nothing.exception)


def test_the_guard_compares_each_way_with_the_exact_one(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    for seed in (1, 2):
        Image.fromarray(texture(60, 80, seed)).save(tmp_path / f"{seed}.png")
    arguments = ["bench", "--bundle", str(bundle), "--device", "cpu", "--guard", "--precision", "bf16", "--json"]
    answer = CliRunner().invoke(cli, [*arguments, "--pictures", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout.splitlines()[-1])["guard"]
    assert [row["precision"] for row in rows] == ["float32"] * 3 + ["bfloat16"]
    assert all(row["held"] and row["pictures"] == 2 for row in rows[:3])
    assert rows[3]["largest_map_difference"] > 0.0
    without = CliRunner().invoke(cli, arguments)
    assert "--pictures" in str(without.exception)
    assert isinstance(without.exception, ConfigError)


def test_the_guard_of_graphs_judges_by_replayed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or says that it did not."""
    folder = write_tiny_bundle(tmp_path / "tiny")
    replays: list[int] = []

    def again(part: Any, own: list[torch.Tensor]) -> Any:
        made = [tensor.clone() for tensor in part(*own)]

        def replay() -> None:
            replays.append(1)
            for kept, new in zip(made, part(*own), strict=True):
                kept.copy_(new)

        return replay, made

    def fails(part: Any, own: list[torch.Tensor]) -> Any:
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(bench_variants, "_ways", lambda *_: [("fp32", Switches(graphs="on"))])
    for capture, held in ((again, True), (fails, False)):

        def source(precision: str, switches: Switches, capture: Any = capture) -> Towers:
            towers = load_towers(folder, "cpu", precision, switches)
            if switches.graphs == "on":
                object.__setattr__(towers, "graphs", Graphs(torch.device("cpu"), True, capture))
            return towers

        (row,) = bench_variants.guard(source, [texture(60, 80, seed) for seed in (1, 2)], [])
        assert row["held"] == held
        assert (row["graphs_captured"] > 0) == held
        assert (row["graphs_left_out"] > 0) != held
    assert replays


def test_agreement_counts_decisions_and_overlap() -> None:
    def result(columns: int, score: float) -> InspectionResult:
        mask = np.zeros((10, 100), bool)
        mask[:, :columns] = True
        defects: list = [None] if columns else []
        return InspectionResult(mask.astype(np.float32), mask, score, 0.5, defects)

    assert mask_iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 1.0
    same = agreement([result(100, 0.9), result(0, 0.1)], [result(99, 0.8), result(0, 0.1)])
    assert (same.decisions_changed, same.least_mask_iou, same.mean_mask_iou) == (0, 0.99, 0.995)
    assert same.held
    assert same.largest_score_difference == pytest.approx(0.1)
    assert not agreement([result(100, 0.9)], [result(98, 0.9)]).held
    flipped = agreement([result(1, 0.9)], [result(0, 0.4)])
    assert (flipped.decisions_changed, flipped.held) == (1, False)


def test_a_bundle_at_another_input_of_sam(tmp_path: Path) -> None:
    bundle = open_bundle(write_tiny_bundle(tmp_path / "tiny"))
    smaller = Inspector.load(bundle.with_sam_input(64), "cpu")
    trace = smaller.trace(texture(60, 80), Recipe(prompt=PromptSettings(region_threshold=0.0)))
    assert trace.sam_embedding is not None
    assert trace.sam_embedding.shape[1:] == (8, 8)  # 64 px of `lite0`, whose embedding has stride 8


def test_a_switch_on_the_command_line_is_checked_and_reported(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    arguments = ["bench", "--bundle", str(bundle), "--device", "cpu", "--size", "90x70", "--runs", "1", "--json"]
    answer = CliRunner().invoke(cli, [*arguments, "--switch", "attention=plain"])
    assert json.loads(answer.stdout.splitlines()[-1])["switches"] == Switches(attention="plain").as_dict()
    wrong = CliRunner().invoke(cli, [*arguments, "--switch", "attention=fast"])
    assert "--switch: attention is one of auto, plain, mask, extended, not 'fast'" in str(wrong.exception)
