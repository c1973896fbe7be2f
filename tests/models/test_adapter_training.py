"""The linear layers' losses are their closed forms, and a run's weights depend on its seed alone."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_bundle import write_parts, write_tiny_bundle

from flawline.config.errors import ConfigError
from flawline.models.adapter_training import AdapterTrainer, TrainingPlan
from flawline.models.bundle import read_bundle
from flawline.models.checkpoints import metadata, read_state_dict
from flawline.models.datasets import read_dataset
from flawline.models.feature_cache import FeatureCache
from flawline.models.ground_truth import read_mask, read_rgb
from flawline.models.mosaic import draw_four, mosaic
from flawline.models.training.losses import dice_loss, focal_loss, published_loss

CPU = torch.device("cpu")


def test_focal_loss_is_its_formula_pixel_by_pixel() -> None:
    probability = torch.tensor([[[0.9, 0.2, 0.5]], [[0.01, 0.999, 0.7]]])
    truth = torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]])
    total = 0.0
    for p_abnormal, g in zip(probability.flatten().tolist(), truth.flatten().tolist(), strict=True):
        hot = [1 - 1e-5, 1e-5] if g else [1e-5, 1 - 1e-5]  # abnormal, normal
        p = hot[0] * p_abnormal + hot[1] * (1 - p_abnormal) + 1e-5
        total += -((1 - p) ** 2) * math.log(p)
    assert focal_loss(probability, truth).item() == pytest.approx(total / 6, rel=1e-5)


def test_dice_loss_is_taken_per_picture() -> None:
    probability = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    truth = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    first = (2 * 0.5 + 1) / (1.0 + 1.0 + 1)
    second = (2 * 1.0 + 1) / (1.0 + 2.0 + 1)
    assert dice_loss(probability, truth).item() == pytest.approx(1 - (first + second) / 2, rel=1e-6)
    assert dice_loss(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)).item() == pytest.approx(0.0)
    both = focal_loss(probability, truth) + dice_loss(probability, truth)
    assert published_loss(probability, truth).item() == pytest.approx(both.item())


def trainer(
    tmp_path: Path, *, cache: bool = True, epochs: int = 2, mosaic: float = 0.5, seed: int = 111
) -> AdapterTrainer:
    if not (tmp_path / "bundle").exists():
        write_tiny_bundle(tmp_path / "bundle")
        write_parts(tmp_path / "data", "plate")
        write_parts(tmp_path / "data", "metal_nut", seed=5)
    plan = TrainingPlan.of("folder", epochs=epochs, batch=4, mosaic=mosaic, seed=seed)
    categories = read_dataset("folder", tmp_path / "data")
    return AdapterTrainer(
        read_bundle(tmp_path / "bundle"), "folder", categories, plan, CPU, tmp_path / "cache" if cache else None
    )


def weights(trainer: AdapterTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.adapter.state_dict().items()}


def run(trainer: AdapterTrainer) -> dict[str, torch.Tensor]:
    trainer.train(lambda _progress: None, lambda: None)
    return weights(trainer)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_one_seed_gives_one_set_of_weights_with_and_without_the_cache(tmp_path: Path) -> None:
    first = run(trainer(tmp_path, cache=False))
    assert same(first, run(trainer(tmp_path)))  # fills the cache
    assert list((tmp_path / "cache").glob("*.safetensors"))
    assert same(first, run(trainer(tmp_path)))  # reads it
    assert not same(first, run(trainer(tmp_path, seed=112)))


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(trainer(tmp_path))
    state = tmp_path / "state"
    first = trainer(tmp_path)

    def interrupt(progress: object) -> None:
        if first.done == 3:
            first.save_state(state)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(interrupt, lambda: None)
    second = trainer(tmp_path)
    assert second.resume(state)
    steps: list[int] = []
    second.train(lambda progress: steps.append(progress.step), lambda: None)
    assert steps[0] == 4
    assert same(whole, weights(second))
    assert not trainer(tmp_path, epochs=3).resume(state)  # another run's state is not taken up
    manifest = tmp_path / "bundle" / "bundle.toml"
    text = manifest.read_text()
    manifest.write_text(text + '[prompts]\nstates_abnormal = ["broken {}"]\n')
    assert not trainer(tmp_path).resume(state), "other words"
    manifest.write_text(text)
    assert trainer(tmp_path).resume(state)
    os.utime(next((tmp_path / "data" / "plate" / "ground_truth").glob("*/*.png")), (1, 1))
    assert not trainer(tmp_path).resume(state), "a mask that was mended"


def test_cached_features_belong_to_one_way_of_computing_them(tmp_path: Path) -> None:
    run(trainer(tmp_path))
    kept = set((tmp_path / "cache").glob("*.safetensors"))
    manifest = tmp_path / "bundle" / "bundle.toml"
    manifest.write_text(manifest.read_text().replace("[clip]\n", "[clip]\nmean = [0.5, 0.5, 0.5]\n", 1))
    run(trainer(tmp_path))
    assert len(set((tmp_path / "cache").glob("*.safetensors"))) == 2 * len(kept)


def test_cached_features_belong_to_the_kind_of_device_that_made_them(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    sample = trained.samples[0][1].image
    trained.features(sample)
    identity = read_bundle(tmp_path / "bundle").checksum("clip.safetensors")
    other = FeatureCache(trained.clip.to("meta"), identity, tmp_path / "cache")  # a device that every machine has
    with pytest.raises(NotImplementedError, match="meta tensor"):  # what is computed there holds nothing to store
        other(sample)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses: list[float] = []
    trainer(tmp_path, epochs=30, mosaic=0.0).train(lambda progress: losses.append(progress.loss), lambda: None)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def test_both_files_hold_the_layers_under_the_published_names(tmp_path: Path) -> None:
    trained = trainer(tmp_path, epochs=1)
    run(trained)
    ours, theirs = tmp_path / "adapter.safetensors", tmp_path / "adapter.pth"
    trained.write(ours, theirs)
    assert sorted(load_file(ours)) == sorted(f"fc.{n}.{kind}" for n in range(4) for kind in ("weight", "bias"))
    assert set(torch.load(theirs, weights_only=True)) == {"trainable_linearlayer", "activation"}
    assert metadata(ours)["activation"] == metadata(theirs)["activation"] == trained.clip.activation
    assert same(read_state_dict(ours), read_state_dict(theirs))


def test_layers_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    trained = trainer(tmp_path, epochs=1)
    made = tmp_path / "made"
    made.mkdir()
    files = made / "layers.safetensors", made / "layers.pth"
    trained.write(*files)
    before = [file.read_bytes() for file in files]
    run(trained)
    (made / "layers.pth.partial").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"layers\.pth: cannot be written: No space"):
        trained.write(*files)
    assert [file.read_bytes() for file in files] == before
    trained.write(*files)
    assert all(now.read_bytes() != then for now, then in zip(files, before, strict=True))
    assert set(made.iterdir()) == set(files)


def test_the_paper_is_the_default() -> None:
    assert TrainingPlan.of("mvtec") == TrainingPlan(3, 0.2, 16, 1e-3, (0.5, 0.999), 111)
    assert TrainingPlan.of("visa").epochs == 15
    assert TrainingPlan.of("visa").mosaic == 0.0


def test_a_mosaic_pastes_pictures_and_masks_alike(tmp_path: Path) -> None:
    write_parts(tmp_path, good=2, defective=4)
    (category,) = read_dataset("folder", tmp_path)
    four = draw_four(category.test, np.random.default_rng(3))
    picture, mask = mosaic(four)
    height, width = read_rgb(four[0].image).shape[:2]
    assert picture.shape == (2 * height, 2 * width, 3)
    for number, sample in enumerate(four):
        rows = slice(number // 2 * height, (number // 2 + 1) * height)
        columns = slice(number % 2 * width, (number % 2 + 1) * width)
        expected = np.zeros((height, width), bool)
        if sample.mask is not None:
            expected = read_mask(sample.mask, (height, width))
        np.testing.assert_array_equal(mask[rows, columns], expected)
        # the spot is blue: where the mask is, so is the colour
        blue = picture[rows, columns, 2] > 180
        assert (blue == expected).mean() > 0.97


def test_data_without_masks_is_refused(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    for kind in ("good", "dent"):
        (tmp_path / "data" / "test" / kind).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / "test" / kind / "0.png")
    categories = read_dataset("folder", tmp_path / "data")
    with pytest.raises(ConfigError, match="no defective picture with a mask"):
        AdapterTrainer(read_bundle(tmp_path / "bundle"), "folder", categories, TrainingPlan.of("folder"), CPU, None)
