"""Calibrate and train-adapter as they are used: files in, files out, clear refusals."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_bundle import CLIP_CONFIG, write_parts, write_tiny_bundle

from flawline.agent.cli_calibrate import calibrate
from flawline.agent.cli_workbench import evaluate, train_adapter
from flawline.config.errors import BundleError, ConfigError
from flawline.config.sources import load_settings
from flawline.models.adapter_file import with_adapter
from flawline.models.bundle import file_sha256, read_bundle
from flawline.models.checkpoints import read_state_dict
from flawline.models.ground_truth import read_rgb
from flawline.models.inspector import Inspector


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", region=1.0)


def test_the_threshold_in_the_file_passes_the_good_parts_it_came_from(tmp_path: Path, bundle: Path) -> None:
    good = write_parts(tmp_path, "plate", good=14, defective=0) / "test" / "good"
    line = tmp_path / "line.toml"
    line.write_text(
        f'# line 4\n[model]\nbundle = "{bundle}"\ndevice = "cpu"\n[recipes.plate]\nobject = "plate"\n'
        '[[cameras]]\nname = "top"\nrecipe = "plate"\n'
    )
    arguments = ["--good", str(good), "--config", str(line), "--recipe", "plate", "--target-fpr", "0.2", "--json"]
    done = CliRunner().invoke(calibrate, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert "# line 4" in line.read_text()
    recipe = load_settings(line, environ={}).recipes["plate"]
    assert recipe.calibration is not None
    assert recipe.threshold == said["threshold"] == recipe.calibration.threshold
    assert recipe.calibration.count == 14
    assert recipe.calibration.false_reject_bound <= 0.2
    assert recipe.calibration.bundle_sha256 == read_bundle(bundle).sha256
    inspector = Inspector.load(bundle, device="cpu", recipe=recipe)
    verdicts = [inspector.inspect(read_rgb(picture)).passed for picture in sorted(good.iterdir())]
    assert verdicts.count(False) == recipe.calibration.rejected


def test_a_calibration_notes_its_precision_and_another_one_warns(tmp_path: Path, bundle: Path) -> None:
    good = write_parts(tmp_path, "plate", good=6, defective=0) / "test" / "good"
    line = tmp_path / "line.toml"
    line.write_text(f'[model]\nbundle = "{bundle}"\ndevice = "cpu"\n[recipes.default]\n')
    for precision, noted in (([], "fp32"), (["--precision", "bf16"], "bf16")):
        arguments = ["--good", str(good), "--config", str(line), "--target-fpr", "0.45", *precision]
        assert CliRunner().invoke(calibrate, arguments, catch_exceptions=False).exit_code == 0
        recipe = load_settings(line, environ={}).recipes["default"]
        assert recipe.calibration is not None
        assert recipe.calibration.precision == noted
    picture = read_rgb(next(good.iterdir()))
    assert Inspector.load(bundle, "cpu", "bf16", recipe).inspect(picture).warning is None
    warning = Inspector.load(bundle, "cpu", "fp32", recipe).inspect(picture).warning
    assert "calibrated at bf16, now the models judge at fp32" in (warning or "")


def test_without_a_file_the_threshold_is_printed_as_toml(tmp_path: Path, bundle: Path) -> None:
    good = write_parts(tmp_path, "plate", good=6, defective=0) / "test" / "good"
    arguments = ["--good", str(good), "--bundle", str(bundle), "--target-fpr", "0.45", "--device", "cpu"]
    done = CliRunner().invoke(calibrate, arguments, catch_exceptions=False)
    assert "at most" in done.stdout
    pasted = tmp_path / "pasted.toml"
    pasted.write_text(done.stdout[done.stdout.index("[recipes") :])
    assert load_settings(pasted, environ={}).recipes["default"].calibration is not None


def test_calibrate_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    good = write_parts(tmp_path, "plate", good=3, defective=0) / "test" / "good"
    with pytest.raises(ConfigError, match="59 are needed"):
        CliRunner().invoke(calibrate, ["--good", str(good), "--target-fpr", "0.05"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--recipe bolt"):
        CliRunner().invoke(calibrate, ["--good", str(good), "--recipe", "bolt"], catch_exceptions=False)


def test_few_parts_give_what_they_can_promise(tmp_path: Path, bundle: Path) -> None:
    good = write_parts(tmp_path, "plate", good=6, defective=0) / "test" / "good"
    arguments = ["--good", str(good), "--bundle", str(bundle), "--device", "cpu", "--dry-run", "--json"]
    done = CliRunner().invoke(calibrate, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert (said["count"], said["rejected"]) == (6, 0)
    assert said["false_reject_bound"] == pytest.approx(1 - 0.05 ** (1 / 6))
    assert "299 would promise 1 %" in done.stderr


@pytest.mark.parametrize(
    ("name", "beside"), [("layers2", "layers2.pth"), ("v1.2", "v1.2.pth"), ("own.pth", "own.safetensors")]
)
def test_trained_layers_are_written_to_the_file_that_was_named(
    tmp_path: Path, bundle: Path, name: str, beside: str
) -> None:
    root = write_parts(tmp_path / "data", "plate", good=2, defective=2)
    out = tmp_path / "made" / name
    where = ["--dataset", "folder", "--root", str(root), "--bundle", str(bundle), "--device", "cpu"]
    short = ["--epochs", "1", "--batch", "2", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert CliRunner().invoke(train_adapter, [*where, *short], catch_exceptions=False).exit_code == 0
    assert {path.name for path in out.parent.iterdir()} == {name, beside}
    ours, theirs = (read_state_dict(path) for path in (out, out.parent / beside))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("named", ["visa_pretrained.safetensors", "visa_pretrained.pth"])
def test_layers_of_others_are_not_overwritten(tmp_path: Path, bundle: Path, named: str) -> None:
    root = write_parts(tmp_path / "data", "plate", good=1, defective=1)
    published, out = tmp_path / "made" / "visa_pretrained.pth", tmp_path / "made" / named
    published.parent.mkdir()
    torch.save({"trainable_linearlayer": read_state_dict(bundle / "adapter.safetensors")}, published)
    before = published.read_bytes()
    arguments = ["--dataset", "folder", "--root", str(root), "--bundle", str(bundle), "--device", "cpu"]
    arguments += ["--epochs", "1", "--batch", "2", "--no-cache", "--out", str(out)]
    with pytest.raises(ConfigError, match=rf"--out {out}: {published} is there already"):
        CliRunner().invoke(train_adapter, arguments, catch_exceptions=False)
    assert published.read_bytes() == before
    assert list(published.parent.iterdir()) == [published]
    published.unlink()
    for _ in range(2):  # what an earlier run wrote is the command's own
        assert CliRunner().invoke(train_adapter, arguments, catch_exceptions=False).exit_code == 0
    assert published.read_bytes() != before


def test_the_cache_is_told_of_and_goes_when_the_layers_are_there(tmp_path: Path, bundle: Path) -> None:
    root, cache = write_parts(tmp_path / "data", "plate", good=2, defective=2), tmp_path / "cache"
    arguments = ["--dataset", "folder", "--root", str(root), "--bundle", str(bundle), "--device", "cpu"]
    arguments += ["--epochs", "1", "--batch", "2", "--out", str(tmp_path / "layers.safetensors"), "--cache"]
    kept = CliRunner().invoke(train_adapter, [*arguments, str(cache), "--keep-cache"], catch_exceptions=False)
    files = list(cache.iterdir())
    assert len(files) == 4
    taps = 4 * 4 * 64 * 8 * 8 * 4  # pictures, taps, channels, places, bytes
    assert taps <= sum(file.stat().st_size for file in files) < 1.02 * taps
    assert f"CLIP's features of 4 pictures go to {cache}: up to {taps / 1e6:.1f} MB still to come" in kept.stderr
    (cache / "of another run.safetensors").touch()
    done = CliRunner().invoke(train_adapter, [*arguments, str(cache)], catch_exceptions=False)
    assert f"{cache}: up to 0.0 MB still to come" in done.stderr
    assert [file.name for file in cache.iterdir()] == ["of another run.safetensors"]
    with pytest.raises(ConfigError, match=r"--cache /proc/nope: .*--no-cache"):
        CliRunner().invoke(train_adapter, [*arguments, "/proc/nope"], catch_exceptions=False)


def test_trained_layers_are_taken_up_by_evaluate(tmp_path: Path, bundle: Path) -> None:
    root = write_parts(tmp_path / "data", "plate", good=2, defective=3)
    out = tmp_path / "made" / "layers.safetensors"
    arguments = [
        "--dataset",
        "folder",
        "--root",
        str(root),
        "--bundle",
        str(bundle),
        "--device",
        "cpu",
        "--epochs",
        "8",
    ]
    arguments += ["--batch", "5", "--lr", "0.01", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    done = CliRunner().invoke(train_adapter, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["layers.pth", "layers.safetensors"]
    figures = {}
    for name, adapter in (("own", []), ("ours", [out]), ("april_gan", [out.with_suffix(".pth")])):
        arguments = ["--dataset", "folder", "--root", str(root), "--bundle", str(bundle), "--device", "cpu"]
        arguments += ["--size", "64", "--out", str(tmp_path / name), *(f"--adapter={path}" for path in adapter)]
        CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
        results = json.loads((tmp_path / name / "results.json").read_text())
        figures[name] = results["mean"]["pixel_ap"]
        judged_by = adapter[0] if adapter else bundle / "adapter.safetensors"
        assert results["settings"]["adapter_sha256"] == file_sha256(judged_by)
        assert results["settings"]["activation"] == "gelu"
        assert ", gelu, cpu, float32;" in (tmp_path / name / "results.md").read_text()
    assert figures["ours"] == figures["april_gan"]
    assert figures["ours"] > figures["own"]  # trained and measured on the same pictures
    other = write_tiny_bundle(tmp_path / "other", activation="quickgelu")
    with pytest.raises(BundleError, match="trained under gelu"):
        CliRunner().invoke(evaluate, [*arguments, f"--bundle={other}", f"--adapter={out}"], catch_exceptions=False)
    wrong = tmp_path / "wrong.pth"
    torch.save({"fc.0.weight": torch.zeros(3, 3)}, wrong)
    with pytest.raises(BundleError, match=r"wrong\.pth"):
        CliRunner().invoke(evaluate, [*arguments, f"--adapter={wrong}"], catch_exceptions=False)


def test_layers_that_may_be_april_gans_are_not_taken_under_quickgelu(tmp_path: Path) -> None:
    """As OpenAI's ViT-L is wide; a bundle fetched without layers runs under quickgelu."""
    tower = CLIP_CONFIG["vision_cfg"] | {"width": 1024, "mlp_ratio": 0.25}
    config = CLIP_CONFIG | {"embed_dim": 768, "vision_cfg": tower}
    quick = write_tiny_bundle(tmp_path / "quick", config=config, activation="quickgelu")
    layers = tmp_path / "visa_pretrained.pth"
    torch.save({"trainable_linearlayer": read_state_dict(quick / "adapter.safetensors")}, layers)
    root = write_parts(tmp_path / "data", "plate", good=1, defective=1)
    arguments = ["--dataset", "folder", "--root", str(root), "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(BundleError, match=r"visa_pretrained\.pth: these layers .*--activation gelu") as raised:
        CliRunner().invoke(evaluate, [*arguments, f"--bundle={quick}", f"--adapter={layers}"], catch_exceptions=False)
    assert "\n" not in str(raised.value)
    towers = Inspector.load(quick, device="cpu").towers  # its own layers: its bundle.toml says quickgelu of them
    manifest = quick / "bundle.toml"
    manifest.write_text(manifest.read_text().replace("quickgelu", "gelu"))
    plain = Inspector.load(quick, device="cpu").towers
    assert (towers.clip.activation, plain.clip.activation) == ("quickgelu", "gelu")
    assert with_adapter(plain, layers).adapter is not None
