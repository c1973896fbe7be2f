"""Drawn parts are the same for the same seed, and their labels are where the picture changed and nowhere else."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from flawline.camera import synthetic
from flawline.camera.families import FAMILIES
from flawline.camera.synthetic import (
    DEFECT_KINDS,
    STATE_WORDS,
    TRAIN_FAMILIES,
    UNSEEN_DEFECT_KINDS,
    UNSEEN_FAMILIES,
    Sample,
    choose_product,
    draw_part,
)
from flawline.camera.words import BAD_WORDS


def part(
    seed: int, family: str, kind: str | None = None, defects: int = 1, size: tuple[int, int] = (128, 128)
) -> Sample:
    """A part of a product that is seen without noise or compression; the same part whatever its defects."""
    product = choose_product(np.random.default_rng(seed), family)
    product = replace(product, optics=replace(product.optics, jpeg=0, noise=0.0))
    kinds = None if kind is None else (kind,)
    return draw_part(np.random.default_rng(seed + 1), product, *size, defects=defects, kinds=kinds)


def test_same_seed_same_sample_and_another_seed_another() -> None:
    def draw(seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        return draw_part(rng, choose_product(rng), 96, 128, defects=2)

    one, same, other = draw(3), draw(3), draw(4)
    for name in ("image", "mask", "kinds", "parts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    assert (one.defects, one.object, one.material) == (same.defects, same.object, same.material)
    assert np.abs(one.image.astype(int) - other.image).mean() > 5


def test_parts_of_one_product_vary_but_look_alike() -> None:
    rng = np.random.default_rng(11)
    for _ in range(5):
        product = choose_product(rng, "leather")
        first, second = (draw_part(rng, product, 128, 128, defects=0).image.astype(float) for _ in range(2))
        stranger = choose_product(rng, "circuit")
        third = draw_part(rng, stranger, 128, 128, defects=0).image.astype(float)
        assert np.abs(first - second).mean() > 0.3
        tone = [picture.mean((0, 1)) for picture in (first, second, third)]
        assert np.abs(tone[0] - tone[1]).max() < max(12.0, np.abs(tone[0] - tone[2]).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_where_a_person_sees_a_change(family: str) -> None:
    drawn = 0
    for seed in (1, 2, 3):
        good, bad = part(seed, family, defects=0), part(seed, family)
        if not bad.defects:  # given up: none would have been seen
            assert not bad.mask.any()
            continue
        drawn += 1
        before, after = (synthetic.colours(one.image.astype(np.float32)) for one in (good, bad))
        change = np.linalg.norm(after - before, axis=2)
        inside = bad.mask > 0
        # Rounding to 8 bits moves a dark colour by up to two units of colour difference. Specks are not marked.
        changed = change > synthetic.least_difference(change, 0.0) + 2
        assert (changed & ~inside).sum() <= 0.05 * inside.sum()
        assert (changed & inside).sum() >= 0.3 * inside.sum()
        assert np.percentile(change[inside], 75) >= synthetic.STRIKING - 2
        share = inside.mean()
        assert synthetic.SMALLEST / 2 <= share <= 1.6 * synthetic.LARGEST
    assert drawn >= 2


def test_what_is_lost_in_the_texture_is_no_defect() -> None:
    """On a coarse texture a stain is kept only where it stands out from it."""
    contrast = []
    for seed in range(12):
        good, bad = part(seed, "carpet", defects=0), part(seed, "carpet", "stain")
        before, after = (synthetic.colours(one.image.astype(np.float32)) for one in (good, bad))
        if bad.defects:
            change = np.linalg.norm(after - before, axis=2)[bad.mask > 0]
            contrast.append(np.percentile(change, 75) / np.sqrt(before.var(axis=(0, 1)).sum()))
    assert len(contrast) >= 6
    assert min(contrast) > 0.8


def test_faint_defects_are_drawn_only_where_they_are_asked_for() -> None:
    """Training pictures hold what is hard to see; a station's pictures do not."""
    weakest = {False: 100.0, True: 100.0}
    for faint in weakest:
        for seed in range(40):
            product = choose_product(np.random.default_rng(seed), "paint")
            product = replace(product, optics=replace(product.optics, jpeg=0, noise=0.0))
            good = draw_part(np.random.default_rng(seed), product, 128, 128, defects=0)
            bad = draw_part(np.random.default_rng(seed), product, 128, 128, defects=1, kinds=("stain",), faint=faint)
            if bad.defects:
                before, after = (synthetic.colours(one.image.astype(np.float32)) for one in (good, bad))
                change = np.linalg.norm(after - before, axis=2)[bad.mask > 0]
                weakest[faint] = min(weakest[faint], float(np.percentile(change, 75)))
    assert weakest[True] < synthetic.STRIKING - 1 < weakest[False]


def test_a_good_part_has_no_label() -> None:
    for seed, family in enumerate(("plate", "component", "weave")):
        sample = part(seed, family, defects=0)
        assert not sample.mask.any()
        assert not sample.kinds.any()
        assert sample.defects == []


@pytest.mark.parametrize("kind", DEFECT_KINDS)
def test_every_kind_can_be_asked_for(kind: str) -> None:
    number = 1 + DEFECT_KINDS.index(kind)
    drawn = 0
    for seed in range(6):
        sample = part(seed, "component", kind)
        if not sample.defects:
            continue
        drawn += 1
        assert set(np.unique(sample.kinds)) == {0, number}
        np.testing.assert_array_equal(sample.mask > 0, sample.kinds > 0)
        (name, (x, y, w, h)), *more = sample.defects
        assert name == kind
        assert not more
        assert (x, y, w, h) == cv2.boundingRect(sample.mask)
    assert drawn >= 3


def test_sizes_and_types_also_of_pictures_that_are_not_square() -> None:
    rng = np.random.default_rng(5)
    for _ in range(8):
        sample = draw_part(rng, choose_product(rng), 96, 160)
        assert sample.image.shape == (96, 160, 3)
        for plane in (sample.mask, sample.kinds, sample.parts):
            assert plane.shape == (96, 160)
            assert plane.dtype == np.uint8
        assert set(np.unique(sample.mask)) <= {0, 255}


def test_shaped_parts_name_their_structures() -> None:
    labels = [part(seed, "circuit", defects=0, size=(192, 192)).parts for seed in range(3)]
    assert max(len(np.unique(plane)) for plane in labels) > 4


def test_unseen_families_and_kinds_stay_out_of_training() -> None:
    assert set(TRAIN_FAMILIES).isdisjoint(UNSEEN_FAMILIES)
    assert set(TRAIN_FAMILIES) | set(UNSEEN_FAMILIES) == set(FAMILIES)
    assert 0.1 <= len(UNSEEN_FAMILIES) / len(FAMILIES) <= 0.3
    surfaces = [FAMILIES[name].surface is not None for name in UNSEEN_FAMILIES]
    assert any(surfaces)
    assert not all(surfaces)
    rng = np.random.default_rng(8)
    assert all(choose_product(rng).family in TRAIN_FAMILIES for _ in range(200))
    drawn = {
        kind for _ in range(60) for kind, _ in draw_part(rng, choose_product(rng, "paint"), 64, 64, defects=3).defects
    }
    assert len(drawn) > 12
    assert drawn.isdisjoint(UNSEEN_DEFECT_KINDS)


def test_captions_name_the_object_and_its_state() -> None:
    rng = np.random.default_rng(9)
    bad, good = part(2, "plate", "rust"), part(2, "plate", defects=0)
    assert bad.object in FAMILIES["plate"].words
    captions = {bad.caption(rng) for _ in range(40)}
    assert len(captions) > 15
    state_words = {words.replace("{}", "").strip() for words in (*STATE_WORDS["rust"], *BAD_WORDS)}
    for caption in captions:
        assert bad.object in caption
        assert any(words in caption for words in state_words), caption
    for _ in range(40):
        caption = good.caption(rng)
        assert good.object in caption
        assert "rust" not in caption
        assert "corro" not in caption


def test_unknown_family_is_refused() -> None:
    with pytest.raises(KeyError, match="no_such"):
        choose_product(np.random.default_rng(0), "no_such")
