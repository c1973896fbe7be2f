"""The shipped bundle does its job: on drawn parts of families it never saw, in words, and as SAM answers prompts."""

import cv2
import numpy as np
import pytest
import torch

from flawline.camera.synthetic import DEFECT_KINDS, UNSEEN_FAMILIES, choose_product, draw_part
from flawline.config.recipe import Recipe
from flawline.models.bundle import find, open_bundle
from flawline.models.inspector import Inspector
from flawline.models.training.pictures import Pictures, PictureSet, draw_set
from flawline.models.training.sam_prompts import draw_points
from flawline.models.training.validate import auroc, figures, held_out_prompts, prompt_quality
from flawline.models.words import STATES_ABNORMAL, STATES_NORMAL

COUNT = 60


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    torch.set_num_threads(2)
    return Inspector.load("demo", device="cpu")


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Other pictures than those that thresholds were chosen on."""
    return draw_set(PictureSet("test", COUNT, 384, 77, 0.5, unseen=True), tmp_path_factory.mktemp("unseen"))


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Other pictures than those that SAM's training was watched on."""
    return draw_set(PictureSet("prompts", 40, 512, 78, 0.0, unseen=True), tmp_path_factory.mktemp("prompts"))


def test_it_is_small_whole_and_says_where_it_comes_from() -> None:
    bundle = open_bundle("demo")
    bundle.verify()
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    assert size <= 25e6
    assert all(file.licence for file in bundle.manifest.files)
    assert (find("demo") / "MODEL_CARD.md").is_file()


@pytest.mark.slow
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
    assert fused["pixel_auroc"] > 0.95
    assert fused["pixel_ap"] > 0.65
    assert fused["pixel_ap"] > alone["pixel_ap"] - 0.01, "SAM spoils the CLIP map"
    assert auroc(np.array(scores, np.float32), truth.reshape(COUNT, -1).any(axis=1)) > 0.9


def test_good_words_and_bad_words_are_opposites(inspector: Inspector) -> None:
    """With the states exchanged the map is the other side of the same decision, whatever the object is called."""
    rng = np.random.default_rng(4)
    part = draw_part(rng, choose_product(rng, "plate"), 384, 384, defects=1, kinds=("scratch",))
    for name in ("metal plate", "gadget"):
        ours = inspector.trace(part.image, Recipe.model_validate({"object": name}))
        turned = Recipe.model_validate(
            {"object": name, "states_normal": list(STATES_ABNORMAL), "states_abnormal": list(STATES_NORMAL)}
        )
        assert np.allclose(inspector.trace(part.image, turned).clip_map, 1 - ours.clip_map, atol=1e-4)
        assert ours.clip_map[part.mask > 0].mean() > ours.clip_map[part.mask == 0].mean() + 0.2


@pytest.mark.slow
def test_words_for_a_kind_of_defect_move_the_map_towards_it(inspector: Inspector) -> None:
    """On parts with rust and scratches, "rust" says more on the rust, "scratch" more on the scratches."""
    recipes = [
        Recipe.model_validate({"object": "part", "states_abnormal": words})
        for words in (["rusty {}", "{} with rust"], ["scratched {}", "{} with a scratch"])
    ]
    right = []
    for seed in range(120):
        rng = np.random.default_rng((9, seed))
        product = choose_product(rng, ("plate", "brushed_metal", "paint", "plastic", "tile", "gear")[seed % 6])
        part = draw_part(rng, product, 384, 384, defects=4, kinds=("rust", "scratch"))
        rust, scratch = (part.kinds == 1 + DEFECT_KINDS.index(kind) for kind in ("rust", "scratch"))
        if min(rust.sum(), scratch.sum()) <= 80:
            continue
        encoded = inspector.encode([part.image], recipes[0])
        maps = [inspector.zero_shot(encoded, recipe)[0].numpy() for recipe in recipes]
        difference = maps[0] - maps[1]
        right.append(bool(difference[rust].mean() > difference[scratch].mean()))
        if len(right) == 40:
            break
    assert len(right) == 40
    assert sum(right) >= 26, f"{sum(right)} of {len(right)}"


def test_normal_words_are_not_abnormal_words(inspector: Inspector) -> None:
    """With both ensembles the same the map says one half; good words for both kinds of state find nothing."""
    rng = np.random.default_rng(3)
    part = draw_part(rng, choose_product(rng, "plate"), 384, 384, defects=2, kinds=("scratch", "rust"))
    for name in ("metal plate", "circuit board", "woven fabric"):
        same = Recipe.model_validate({"object": name, "states_normal": ["{}"], "states_abnormal": ["{}"]})
        assert np.allclose(inspector.trace(part.image, same).clip_map, 0.5, atol=1e-5)


@pytest.mark.slow
def test_sam_answers_prompts(inspector: Inspector, prompted: Pictures) -> None:
    quality = prompt_quality(inspector.towers.sam, prompted)
    assert quality["point_iou"] > 0.55
    assert quality["box_iou"] > 0.68
    assert quality["box_point_iou_large"] > 0.76
    assert quality["box_point_iou"] > quality["point_iou"] + 0.05, "the box says nothing"


@pytest.mark.slow
@pytest.mark.parametrize("label", [1, 0], ids=["positive", "negative"])
def test_a_further_point_moves_the_answer(inspector: Inspector, prompted: Pictures, label: int) -> None:
    """A positive point where the mask misses the defect raises it there, a negative one beside the defect lowers it."""
    towers = inspector.towers
    moved = []
    for row, mask, rng in held_out_prompts(prompted, 3):
        image = torch.from_numpy(np.asarray(prompted.image[row])).permute(2, 0, 1).unsqueeze(0).float()
        points, labels, present = (torch.from_numpy(part).unsqueeze(0) for part in draw_points(rng, mask, 1, 0))
        with torch.inference_mode():
            embedding = towers.embed(image)
            logits, scores = towers.refiner.decode(embedding, points, labels, present)
            best = int(scores[0, 1:].argmax()) + 1
            found = cv2.resize(logits[0, best].numpy(), mask.shape) > 0
            wrong = np.argwhere(~found & mask if label else found & ~mask)
            if len(wrong) < 10:
                continue
            y, x = wrong[rng.integers(len(wrong))]
            points[0, 3] = torch.tensor([float(x), float(y)])
            labels[0, 3], present[0, 3] = label, True
            again, _ = towers.refiner.decode(embedding, points, labels, present)
        place = (0, best, y * logits.shape[-2] // len(mask), x * logits.shape[-1] // mask.shape[1])
        change = float(again[place]) - float(logits[place])
        moved.append(change > 0 if label else change < 0)
    assert len(moved) >= 12
    assert np.mean(moved) >= 0.8


@pytest.mark.slow
def test_the_last_mask_is_taken_up(inspector: Inspector) -> None:
    towers = inspector.towers
    kept = []
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
            prompt = torch.tensor([[[float(x), float(y)]]]), torch.tensor([[1]]), torch.tensor([[True]])
            first, scores = towers.refiner.decode(embedding, *prompt)
            best = int(scores[0, 1:].argmax()) + 1
            before = first[0, best] > 0
            if int(before.sum()) < 10:
                continue
            again, scores = towers.refiner.decode(embedding, *prompt, mask_input=first[:, best : best + 1])
            chosen = again[0, int(scores[0, 1:].argmax()) + 1] > 0
            kept.append(float((chosen & before).sum() / (chosen | before).sum()))
    assert len(kept) >= 8
    assert np.mean(kept) >= 0.6
