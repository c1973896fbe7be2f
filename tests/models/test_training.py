"""Training of the embedded bundle: its losses, its pictures, and the whole way in small."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flawline.models.inspector import Inspector
from flawline.models.training.augment import augment
from flawline.models.training.build import build_demo, small_plan
from flawline.models.training.losses import balanced_loss, dice_loss, focal_loss, segmentation_loss
from flawline.models.training.pictures import CHUNK, PictureSet, draw_set
from flawline.models.training.token_table import embed_texts
from flawline.models.training.train_sam import draw_target
from flawline.models.training.validate import auroc, figures


def test_losses_are_their_equations() -> None:
    p = torch.tensor([[[0.9, 0.2], [0.4, 0.1]]])
    g = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    true_class = np.array([0.9, 0.8, 0.4, 0.9])
    expected = np.mean(-((1 - true_class) ** 2) * np.log(true_class))
    assert float(focal_loss(p, g)) == pytest.approx(expected, abs=1e-4)
    assert float(dice_loss(p, g)) == pytest.approx(1 - (2 * 1.3 + 1) / (1.6 + 2 + 1), abs=1e-6)
    balanced = -0.5 * (np.log(0.9) + np.log(0.4)) / 2 - 0.5 * (np.log(0.8) + np.log(0.9)) / 2
    assert float(balanced_loss(p, g)) == pytest.approx(balanced, abs=1e-3)


def test_a_picture_without_a_defect_teaches_only_that_it_is_good() -> None:
    p = torch.full((2, 4, 4), 0.3)
    g = torch.zeros(2, 4, 4)
    g[1, :2] = 1.0
    both = float(segmentation_loss(p, g))
    assert both == pytest.approx(float(balanced_loss(p, g) + focal_loss(p, g) + dice_loss(p[1:], g[1:])), abs=1e-6)


def test_labels_go_where_the_picture_goes() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image = np.full((96, 96, 3), 40, np.uint8)
        label = np.zeros((96, 96), np.uint8)
        x, y = (int(value) for value in rng.integers(10, 60, 2))
        image[y : y + 24, x : x + 30] = 220
        label[y : y + 24, x : x + 30] = 7
        picture, (plane,) = augment(rng, image, [label], 96)
        assert picture.shape == (96, 96, 3)
        assert set(np.unique(plane)) <= {0, 7}
        grey = picture.mean(axis=2)
        if (plane == 7).sum() > 50 and (plane == 0).sum() > 50:
            inside = cv2.erode((plane == 7).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            assert np.median(grey[inside]) > np.median(grey[plane == 0]) + 20


def test_an_interrupted_drawing_goes_on_and_gives_the_same_pictures(tmp_path: Path) -> None:
    wanted = PictureSet("few", CHUNK + 5, 96, 9, 0.4)
    first = draw_set(wanted, tmp_path / "a", processes=2)
    folder = next((tmp_path / "a").iterdir())
    (folder / "words-0001.json").unlink()
    (folder / "image-0001.npy").write_bytes(b"torn")
    again = draw_set(wanted, tmp_path / "a", processes=1)
    assert np.array_equal(first.image, again.image)
    assert first.words == again.words
    bad = [bool(entry["defects"]) for entry in again.words]
    assert 0.15 < np.mean(bad) < 0.6
    assert all((plane > 0).any() for plane, defective in zip(again.kinds, bad, strict=True) if defective)


def test_prompts_for_training_lie_where_they_say() -> None:
    rng = np.random.default_rng(0)
    kinds = np.zeros((128, 128), np.uint8)
    kinds[20:60, 30:90] = 3
    for _ in range(200):
        target = draw_target(rng, kinds, np.zeros_like(kinds))
        if target is None:
            continue
        for (x, y), label, present in zip(target.points, target.labels, target.present, strict=True):
            if present:
                assert target.mask[int(y), int(x)] == bool(label)
        if target.box is not None:
            assert np.abs(target.box - [30, 20, 89, 59]).max() < 0.1 * 60 * 3


def test_the_sentence_model_knows_what_is_alike() -> None:
    texts = ["rust", "rusty", "corrosion", "scratch", "scratched", "leather", "wood", "metal", "steel", "cat"]
    table = embed_texts(texts, 8)
    unit = torch.nn.functional.normalize(table, dim=1)
    alike = unit @ unit.T
    assert alike[0, 1] > alike[0, 3] + 0.2
    assert alike[3, 4] > alike[3, 5] + 0.2
    assert alike[7, 8] > alike[7, 9] + 0.2


def test_figures_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(1)
    maps = rng.random((6, 20, 20)).astype(np.float32).round(2)
    truth = (maps + rng.normal(0, 0.4, maps.shape)) > 0.9
    truth[:2] = False
    measured = figures(maps, truth)
    scores, labels = maps.ravel(), truth.ravel()
    wins = (scores[labels][:, None] > scores[~labels][None]).mean()
    ties = (scores[labels][:, None] == scores[~labels][None]).mean()
    assert measured["pixel_auroc"] == pytest.approx(wins + ties / 2, abs=1e-9)
    best = max(2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in np.unique(scores))
    assert measured["pixel_f1_max"] == pytest.approx(best, abs=1e-9)
    assert np.isnan(auroc(scores, np.zeros_like(labels)))


@pytest.mark.slow
def test_the_whole_way_in_small_gives_a_bundle_that_loads(tmp_path: Path) -> None:
    lines: list[str] = []
    build_demo(small_plan(), tmp_path / "work", tmp_path / "demo", lines.append, processes=2)
    inspector = Inspector.load(tmp_path / "demo", device="cpu")
    result = inspector.inspect(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8))
    assert result.anomaly_map.shape == (120, 160)
    hashes = (tmp_path / "demo" / "bundle.toml").read_text()
    lines.clear()
    build_demo(small_plan(), tmp_path / "work", tmp_path / "again", lines.append, processes=2)
    assert not any("step" in line for line in lines), "a finished training was not taken up"
    assert (tmp_path / "again" / "bundle.toml").read_text() == hashes
