"""`flawline bench`: the shape of its answer, and that the reference does the work that it is timed for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_bundle import write_tiny_bundle

from flawline.agent.cli import cli
from flawline.config.recipe import PromptSettings, Recipe
from flawline.models.bench import PlainPipeline, texture
from flawline.models.inspector import Inspector


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
    assert ours["cascade"] < ours["suspicious"]
    assert result["ratio"] == pytest.approx(result["reference_ms"] / ours["suspicious"], rel=1e-2)


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
