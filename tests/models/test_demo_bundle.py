"""The shipped bundle does its job: on drawn parts of families it never saw, in words, and as SAM answers prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flawline.camera.synthetic import UNSEEN_FAMILIES, choose_product, draw_part
from flawline.config.recipe import Recipe
from flawline.models.bundle import find, open_bundle
from flawline.models.inspector import Inspector
from flawline.models.training.pictures import Pictures, PictureSet, draw_set
from flawline.models.training.train_sam import prompt_quality
from flawline.models.training.validate import auroc, figures

COUNT = 60


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    torch.set_num_threads(2)
    return Inspector.load("demo", device="cpu")


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Other pictures than those that thresholds were chosen on."""
    return draw_set(PictureSet("test", COUNT, 384, 77, 0.5, unseen=True), tmp_path_factory.mktemp("unseen"))


def test_it_is_small_whole_and_says_where_it_comes_from() -> None:
    bundle = open_bundle("demo")
    bundle.verify()
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    assert size <= 25e6
    assert all(file.licence for file in bundle.manifest.files)
    assert (find("demo") / "MODEL_CARD.md").is_file()


def test_it_finds_defects_on_families_it_never_saw(inspector: Inspector, unseen: Pictures) -> None:
    recipe = Recipe.model_validate({"min_defect_area_px": 20})
    maps, clip_maps, scores = [], [], []
    for image in unseen.image:
        trace = inspector.trace(np.asarray(image), recipe)
        maps.append(trace.result.anomaly_map)
        clip_maps.append(trace.clip_map)
        scores.append(trace.result.score)
    truth = unseen.kinds > 0
    fused = figures(np.stack(maps)[:, ::2, ::2], truth[:, ::2, ::2])
    alone = figures(np.stack(clip_maps)[:, ::2, ::2], truth[:, ::2, ::2])
    assert fused["pixel_auroc"] > 0.90
    assert fused["pixel_f1_max"] > alone["pixel_f1_max"], "SAM adds nothing to the CLIP map"
    assert auroc(np.array(scores, np.float32), truth.reshape(COUNT, -1).any(axis=1)) > 0.80


def test_words_move_the_map(inspector: Inspector) -> None:
    """Rust is found by its own words rather than by a scratch's, and the other way round."""
    wins = []
    for seed in range(12):
        rng = np.random.default_rng((5, seed))
        product = choose_product(rng, families=("plate", "brushed_metal", "ground_metal"))
        for kind, words, other in (
            ("rust", ("rusty {}", "{} with rust"), ("scratched {}", "{} with a scratch")),
            ("scratch", ("scratched {}", "{} with a scratch"), ("rusty {}", "{} with rust")),
        ):
            part = draw_part(rng, product, 384, 384, defects=1, kinds=(kind,))
            if not part.mask.any():
                continue
            inside = part.mask > 0
            own, foreign = (
                inspector.trace(part.image, Recipe.model_validate({"object": part.object, "states_abnormal": states}))
                for states in (words, other)
            )
            wins.append(own.clip_map[inside].mean() > foreign.clip_map[inside].mean())
    assert len(wins) >= 12
    assert np.mean(wins) >= 0.7


def test_normal_words_are_not_abnormal_words(inspector: Inspector) -> None:
    """With both ensembles the same the map says one half; good words for both kinds of state find nothing."""
    rng = np.random.default_rng(3)
    part = draw_part(rng, choose_product(rng, "plate"), 384, 384, defects=2, kinds=("scratch", "rust"))
    for name in ("metal plate", "circuit board", "woven fabric"):
        same = Recipe.model_validate({"object": name, "states_normal": ["{}"], "states_abnormal": ["{}"]})
        assert np.allclose(inspector.trace(part.image, same).clip_map, 0.5, atol=1e-5)


def test_sam_answers_prompts(inspector: Inspector, tmp_path: Path) -> None:
    sam = inspector.towers.sam
    pictures = draw_set(PictureSet("prompts", 40, 512, 78, 0.0, unseen=True), tmp_path)
    quality = prompt_quality(sam, pictures)
    assert quality["point_iou"] > 0.35
    assert quality["box_point_iou"] > 0.55
    assert quality["box_point_iou"] > quality["point_iou"]


def test_negative_points_and_the_last_mask_move_the_answer_the_right_way(inspector: Inspector) -> None:
    towers = inspector.towers
    fewer, kept = [], []
    for seed in range(20):
        rng = np.random.default_rng((6, seed))
        part = draw_part(rng, choose_product(rng, families=UNSEEN_FAMILIES), 512, 512, defects=1)
        if (part.mask > 0).sum() < 200:
            continue
        image = torch.from_numpy(part.image).permute(2, 0, 1).unsqueeze(0).float()
        with torch.inference_mode():
            embedding = towers.embed(image)
            places = np.argwhere(part.mask > 0)
            y, x = places[len(places) // 2]
            points = torch.tensor([[[float(x), float(y)], [0.0, 0.0]]])
            labels = torch.tensor([[1, 0]])
            first, scores = towers.refiner.decode(embedding, points, labels, torch.tensor([[True, False]]))
            best = int(scores[0, 1:].argmax()) + 1
            found = torch.nonzero(first[0, best] > 0)
            if len(found) < 10:
                continue
            row, column = (int(value) for value in found[0])
            points[0, 1] = torch.tensor([column * 4.0 + 1.5, row * 4.0 + 1.5])
            second, _ = towers.refiner.decode(embedding, points, labels, torch.tensor([[True, True]]))
            fewer.append(float(second[0, best, row, column]) < float(first[0, best, row, column]))
            again, scores = towers.refiner.decode(
                embedding, points, labels, torch.tensor([[True, False]]), mask_input=first[:, best : best + 1]
            )
            chosen = again[0, int(scores[0, 1:].argmax()) + 1] > 0
            before = first[0, best] > 0
            kept.append(float((chosen & before).sum() / (chosen | before).sum()))
    assert len(fewer) >= 10
    assert np.mean(fewer) >= 0.8, "a negative point must lower the mask where it stands"
    assert np.mean(kept) >= 0.6, "the last mask must be taken up"
