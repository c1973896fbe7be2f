"""Masks of drawn defects are outlines as a person would draw them, not the pixels that happen to differ."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from flawline.camera.outline import outlined

EDGE = 512
Mask = NDArray[np.uint8]


def empty() -> Mask:
    return np.zeros((200, 200), np.uint8)


def test_the_middle_of_a_dent_belongs_to_it() -> None:
    """Only the lit and the shaded side of a dent change; the outline goes around both."""
    sides = empty()
    cv2.ellipse(sides, (100, 100), (40, 40), 0, 20, 160, 1, 14)
    cv2.ellipse(sides, (100, 100), (40, 40), 0, 200, 340, 1, 14)
    assert not sides[100, 100]
    outline = outlined(sides, 0.35, EDGE)
    assert outline[100, 100]
    assert not outline[100, 20]
    assert not outline[20, 100]
    assert (outline >= sides).all()


def test_a_speckled_stain_is_one_area() -> None:
    rng = np.random.default_rng(3)
    disc = empty()
    cv2.circle(disc, (100, 100), 50, 1, -1)
    speckled = (disc * (rng.random(disc.shape) < 0.5)).astype(np.uint8)
    outline = outlined(speckled, 0.15, EDGE)
    both, either = (outline & disc).sum(), (outline | disc).sum()
    assert both / either > 0.95


def test_what_lies_between_two_scratches_is_whole() -> None:
    scratches = empty()
    cv2.line(scratches, (20, 80), (180, 80), 1, 3)
    cv2.line(scratches, (20, 110), (180, 110), 1, 3)
    assert np.array_equal(outlined(scratches, 0.06, EDGE), scratches)


def test_a_loop_of_hair_is_no_disc() -> None:
    loop = empty()
    cv2.circle(loop, (100, 100), 60, 1, 3)
    assert not outlined(loop, 0.06, EDGE)[100, 100]


def test_specks_far_from_it_are_dropped() -> None:
    marks = empty()
    cv2.circle(marks, (60, 60), 20, 1, -1)
    marks[150, 150] = 1
    outline = outlined(marks, 0.15, EDGE)
    assert outline[60, 60]
    assert not outline[150, 150]


@pytest.mark.parametrize("place", [(0, 0), (100, 0), (199, 199)])
def test_a_defect_at_the_edge_of_its_window_stays_there(place: tuple[int, int]) -> None:
    cut = empty()
    cv2.circle(cut, place, 12, 1, -1)
    assert np.array_equal(outlined(cut, 0.15, EDGE), cut)


def test_the_changed_pixels_are_left_as_they_were() -> None:
    changed = empty()
    cv2.rectangle(changed, (50, 50), (90, 90), 1, 2)
    before = changed.copy()
    outlined(changed, 0.0, EDGE)
    assert np.array_equal(changed, before)
