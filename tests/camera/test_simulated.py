"""The simulated line delivers the same parts for the same seed, at its rate or on triggers, with their truth."""

import threading
import time

import numpy as np
import pytest

from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.registry import make_camera
from flawline.camera.simulated import SimulatedCamera
from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings

LINE = {"seed": 7, "width": 96, "height": 64, "family": "plate", "defect_rate": 0.5}


def camera(simulated: dict[str, object] | None = None, **more: object) -> Camera:
    settings = {"name": "sim", "backend": "simulated", "fps": 200.0, "simulated": {**LINE, **(simulated or {})}, **more}
    return make_camera(CameraSettings.model_validate(settings))


def grab(source: Camera, count: int) -> list[Frame]:
    """The next frames, as copies."""
    frames = []
    for _ in range(count):
        frame = None
        deadline = time.monotonic() + 60
        while frame is None:
            assert time.monotonic() < deadline, "no frame came"
            frame = source.grab(1.0)
        frames.append(frame)
    return frames


def test_the_same_seed_gives_the_same_parts_and_another_seed_others() -> None:
    lines = []
    for seed in (7, 7, 8):
        with camera({"seed": seed}) as source:
            lines.append(grab(source, 6))
    one, same, other = lines
    assert [frame.frame_id for frame in one] == list(range(6))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        assert a.truth == b.truth
    assert any(not np.array_equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True))


def test_truth_says_what_is_on_the_part() -> None:
    with camera() as source:
        assert isinstance(source, SimulatedCamera)
        frames = grab(source, 10)
        for frame in frames:
            sample = source.part(frame.frame_id)
            np.testing.assert_array_equal(frame.pixels, sample.image)
            assert frame.truth["good"] == (not sample.mask.any())
            assert frame.truth["defect_px"] == np.count_nonzero(sample.mask)
            assert [defect["kind"] for defect in frame.truth["defects"]] == [kind for kind, _ in sample.defects]
    assert {frame.truth["good"] for frame in frames} == {True, False}


@pytest.mark.parametrize(("rate", "good"), [(0.0, True), (1.0, False)])
def test_defect_rate(rate: float, good: bool) -> None:
    with camera({"defect_rate": rate}) as source:
        assert all(frame.truth["good"] is good for frame in grab(source, 5))


def test_reopened_line_goes_on_with_the_next_part_and_leaves_no_thread() -> None:
    source = camera()
    with source:
        first = grab(source, 3)
    assert not [thread for thread in threading.enumerate() if thread.name == "painter-sim"]
    with source:
        second = grab(source, 2)
    source.close()
    assert [frame.frame_id for frame in first + second] == [0, 1, 2, 3, 4]


def test_a_trigger_makes_one_part_each() -> None:
    with camera(trigger="software", fps=None) as source:
        assert source.grab(0.05) is None
        source.trigger()
        source.trigger()
        assert [frame.frame_id for frame in grab(source, 2)] == [0, 1]
        assert source.grab(0.05) is None


def test_triggers_do_not_outlive_the_line_that_was_open() -> None:
    source = camera(trigger="software", fps=None)
    with source:
        source.trigger()
        source.trigger()
        grab(source, 1)
    with source:
        assert source.grab(0.2) is None
        source.trigger()
        assert [frame.frame_id for frame in grab(source, 1)] == [1]


def test_frames_come_at_the_set_rate() -> None:
    with camera(fps=20.0) as source:
        grab(source, 1)
        start = time.monotonic()
        grab(source, 8)
        assert time.monotonic() - start >= 0.3


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ConfigError, match=r"sim.*no_such.*plate"):
        camera({"family": "no_such"})
    with pytest.raises(ConfigError, match="no trigger line"):
        camera(trigger="hardware")
