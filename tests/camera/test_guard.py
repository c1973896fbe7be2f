"""Pictures that no one should judge are refused with the reason; good ones pass."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from flawline.camera.guard import Guard, levels, sample, sharpness, teach
from flawline.camera.textures import choose_material
from flawline.config.errors import ImageError
from flawline.config.settings_camera import CameraSettings

Picture = NDArray[np.uint8]


def guard(backend: str = "genicam", **limits: object) -> Guard:
    return Guard(CameraSettings.model_validate({"name": "top", "backend": backend, "guard": limits}))


def part(seed: int, blur: float = 0.0, kind: str = "cast") -> Picture:
    """A cast surface, (480, 640, 3); the same design for every seed."""
    material = choose_material(np.random.default_rng(7), kind)
    bare = material.render(np.random.default_rng(seed), 480, 640, 1.0, (0.7, 0.7))
    picture = np.clip(cv2.GaussianBlur(bare, (0, 0), blur) if blur else bare, 0, 255)
    noise = np.random.default_rng(seed).normal(0, 1.0, picture.shape)  # a sensor's own
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("blur", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("contrast", [100, 200])
def test_sharpness_of_a_blurred_step_is_what_the_formula_says(blur: float, contrast: float) -> None:
    step = np.tile((np.arange(400) > 200) * contrast, (400, 1)).astype(np.float32)
    plane = cv2.GaussianBlur(step, (0, 0), blur).astype(np.uint8)
    expected = ((blur**2 + 9) / (blur**2 + 1)) ** 0.25 - 1
    assert sharpness(cv2.merge([plane, plane, plane])) == pytest.approx(expected, abs=0.03)


def test_an_even_picture_has_no_sharpness() -> None:
    assert sharpness(np.full((300, 300, 3), 90, np.uint8)) == pytest.approx(0.0, abs=1e-6)


def test_levels_are_exact() -> None:
    grid = np.zeros((10, 20, 3), np.uint8)
    grid[0, :10, 1] = 251
    grid[1, :2, 2] = 249
    assert levels(grid) == (251, pytest.approx(10 / 200))
    assert levels(np.full((5, 5, 3), 255, np.uint8)) == (255, 1.0)
    assert levels(np.zeros((5, 5, 3), np.uint8)) == (0, 0.0)


def test_the_grid_is_a_view_of_about_100_lines() -> None:
    picture = np.zeros((1944, 2592, 3), np.uint8)
    grid = sample(picture)
    assert np.shares_memory(grid, picture)
    assert 100 <= grid.shape[0] < 200


def test_taught_limits_pass_good_parts_and_stop_what_is_not() -> None:
    limits = teach((part(seed), "Mono8") for seed in range(8))
    judge = Guard(CameraSettings(name="top", backend="genicam", guard=limits))
    for seed in range(20, 40):
        judge.check(part(seed), "Mono8")
    bad = {
        "black: 99 %": part(50) // 32,
        "saturated: ": np.maximum(part(50), 252),
        "out of focus: sharpness": part(50, blur=4),
        "wrong size: 320 x 480 px, 640 x 480 is expected": part(50)[:, :320],
    }
    for words, picture in bad.items():
        with pytest.raises(ImageError, match=words):
            judge.check(picture, "Mono8")
    with pytest.raises(ImageError, match="wrong depth: Mono12, Mono8 is expected"):
        judge.check(part(50), "Mono12")


def test_a_frozen_picture_is_refused_until_it_moves_again() -> None:
    judge = guard(frozen_after=3)
    first, second = part(1), part(2)
    judge.check(first, "Mono8")
    judge.check(first, "Mono8")
    for _ in range(2):
        with pytest.raises(ImageError, match=r"frozen: the last [34] pictures are the same"):
            judge.check(first, "Mono8")
    judge.check(second, "Mono8")
    judge.check(first, "Mono8")


@pytest.mark.parametrize(("backend", "after"), [("genicam", 2), ("pylon", 2), ("gentl", 2), ("opencv", 5)])
def test_live_cameras_may_not_repeat(backend: str, after: int) -> None:
    live = guard(backend)
    for _ in range(after - 1):
        live.check(part(1), "Mono8")
    with pytest.raises(ImageError, match=f"frozen: the last {after}"):
        live.check(part(1), "Mono8")


def test_files_and_the_simulated_line_may_repeat() -> None:
    settings = {"name": "top", "backend": "opencv", "path": "/recording.avi"}
    for replay in (guard("folder"), guard("simulated"), Guard(CameraSettings.model_validate(settings))):
        for _ in range(20):
            replay.check(part(1), "RGB8")


def test_a_lens_cap_is_called_black_and_not_frozen() -> None:
    live = guard()
    for _ in range(3):
        with pytest.raises(ImageError, match="black"):
            live.check(np.zeros((40, 40, 3), np.uint8), "Mono8")


def test_one_switch_turns_it_off() -> None:
    off = guard(enabled=False, sharpness=5.0, width=3, frozen_after=1)
    off.check(np.zeros((40, 40, 3), np.uint8), "Mono8")
    with pytest.raises(ImageError, match="black"):
        guard().check(np.zeros((40, 40, 3), np.uint8), "Mono8")


def test_it_cannot_be_taught_by_nothing_or_by_pictures_of_two_kinds() -> None:
    with pytest.raises(ImageError, match="no good picture"):
        teach([])
    with pytest.raises(ImageError, match="differ in form"):
        teach([(part(1), "Mono8"), (part(2)[:100], "Mono8")])
