"""A folder camera delivers every file once, in order, and says which one it cannot read."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from flawline.camera.camera import EndOfFrames
from flawline.camera.pixels import to_rgb8
from flawline.camera.registry import make_camera
from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings


def settings(path: Path, **more: object) -> CameraSettings:
    return CameraSettings.model_validate({"name": "top", "backend": "folder", "path": path, **more})


def test_each_picture_once_sorted_with_depths_and_faults(tmp_path: Path) -> None:
    colour = np.zeros((8, 10, 3), np.uint8)
    colour[..., 2] = 200  # red, in OpenCV's BGR
    (tmp_path / "b").mkdir()
    cv2.imwrite(str(tmp_path / "a.png"), colour)
    cv2.imwrite(str(tmp_path / "b" / "deep.png"), np.full((8, 10), 65535, np.uint16))
    whole = cv2.imencode(".jpg", np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    (tmp_path / "c.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d.png").write_bytes(b"")
    with make_camera(settings(tmp_path)) as camera:
        frames = [camera.grab(1.0) for _ in range(4)]
        with pytest.raises(EndOfFrames):
            camera.grab(0.1)
    assert [Path(frame.source or "").name for frame in frames if frame] == [
        "a.png",
        "deep.png",
        "c.jpg",
        "d.png",
    ]
    red, deep, cut, empty = frames
    assert red is not None
    assert red.pixels is not None
    out = np.empty((8, 10, 3), np.uint8)
    to_rgb8(red.pixels, red.pixel_format, out)
    assert (out == (200, 0, 0)).all()
    assert deep is not None
    assert deep.pixels is not None
    to_rgb8(deep.pixels, deep.pixel_format, out)
    assert (out == 255).all()
    assert cut is not None
    assert "c.jpg: is truncated" in (cut.fault or "")
    assert empty is not None
    assert "d.png: is empty" in (empty.fault or "")


def test_software_trigger_gives_one_picture_each(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4), np.uint8))
    with make_camera(settings(tmp_path, trigger="software", loop=True)) as camera:
        assert camera.grab(0.01) is None
        camera.trigger()
        camera.trigger()
        assert [camera.grab(0.5) is not None for _ in range(2)] == [True, True]
        assert camera.grab(0.01) is None


def test_missing_and_empty_folders_are_wrong_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no pictures"):
        make_camera(settings(tmp_path))
    with pytest.raises(ConfigError, match="is not a folder"):
        make_camera(settings(tmp_path / "none"))
