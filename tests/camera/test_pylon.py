"""Basler cameras as pylon emulates them: the real runtime, its triggers, its failed buffers, its picture replay."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from flawline.camera import pylon
from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.pixels import to_rgb8
from flawline.camera.pylon import list_devices
from flawline.config.errors import CameraError, ConfigError

Make = Callable[..., Camera]
Grab = Callable[..., list[Frame]]


def as_rgb(frame: Frame) -> np.ndarray:
    assert frame.pixels is not None
    out = np.zeros((*frame.size, 3), np.uint8)
    to_rgb8(frame.pixels, frame.pixel_format, out)
    return out


def test_both_emulated_cameras_are_listed() -> None:
    devices = list_devices()
    assert [device.serial for device in devices] == ["0815-0000", "0815-0001"]
    assert {device.model for device in devices} == {"Emulation"}


def test_one_of_two_must_be_chosen(camera: Make) -> None:
    with pytest.raises(ConfigError, match="2 cameras answer; choose one by serial"):
        camera("pylon").open()
    with pytest.raises(CameraError, match="no pylon camera answers with serial = 'X'"):
        camera("pylon", serial="X").open()


@pytest.mark.parametrize(
    ("name", "arrives"),
    [
        ("Mono8", "Mono8"),
        ("RGB8Packed", "RGB8"),
        ("BGR8Packed", "BGR8"),
        ("Mono16", "Mono16"),
        ("BayerRG8", "BayerRG8"),
    ],
)
def test_a_replayed_picture_arrives_as_it_was(
    camera: Make, grab: Grab, tmp_path: Path, name: str, arrives: str
) -> None:
    colour = "RGB" in name or "BGR" in name
    shade = np.linspace(0, 255, 96).astype(np.uint8)
    picture = np.repeat(np.repeat(shade[None, :], 64, axis=0)[:, :, None], 3, axis=2)
    if colour:
        picture = np.dstack([picture[:, :, 0], picture[:, ::-1, 0], np.full((64, 96), 30, np.uint8)])
    cv2.imwrite(str(tmp_path / "part.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    features = {
        "Width": 96,
        "Height": 64,
        "PixelFormat": name,
        "TestImageSelector": "Off",
        "ImageFilename": str(tmp_path),
        "ImageFileMode": "On",
    }
    source = camera("pylon", serial="0815-0000", features=features)
    source.open()
    frame = grab(source, 2)[-1]
    assert frame.pixel_format == arrives
    difference = np.abs(as_rgb(frame).astype(int) - picture)
    assert difference[1:-1, 1:-1].max() <= (0 if name in ("Mono8", "RGB8Packed", "BGR8Packed") else 6)


def test_two_cameras_at_once_and_numbers_without_gaps(camera: Make, grab: Grab) -> None:
    pair = [camera("pylon", serial=serial, fps=50, features={"Width": 64}) for serial in ("0815-0000", "0815-0001")]
    for source in pair:
        source.open()
    for source in pair:
        ids = [frame.frame_id for frame in grab(source, 10)]
        assert ids == list(range(ids[0], ids[0] + 10))
        assert source.info()["missed"] == 0


def test_software_and_hardware_trigger(camera: Make, grab: Grab) -> None:
    source = camera("pylon", index=0, trigger="software")
    source.open()
    source.await_readiness()
    source.trigger()  # at once: the camera is waited for
    grab(source)
    for _ in range(3):
        source.await_readiness()
        source.trigger()
    assert np.diff([frame.frame_id for frame in grab(source, 3)]).tolist() == [1, 1]
    assert source.grab(0.3) is None
    source.close()
    with pytest.raises(CameraError, match="is not connected"):
        source.trigger()
    waiting = camera("pylon", index=0, trigger="hardware")
    waiting.open()
    assert waiting.grab(0.3) is None


def test_failed_buffers_are_faults(camera: Make, grab: Grab) -> None:
    table = {"ForceFailedBufferCount": 3, "ForceFailedBuffer": True}
    source = camera("pylon", index=0, fps=50, features=table)
    source.open()
    frames = grab(source, 8)
    faults = [frame.fault for frame in frames if frame.pixels is None]
    assert len(faults) == 3
    assert all("camera 'top': frame" in (fault or "") and "incomplete" in (fault or "") for fault in faults)
    assert {frame.fault_reason for frame in frames if frame.fault} == {"camera_fault"}
    assert source.info()["incomplete"] == 3


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"Width": 9999}, "features.Width = 9999: out of range; the camera allows 1 to 4096"),
        ({"ExposurTime": 5.0}, "no feature 'ExposurTime'; did you mean 'ExposureTime'"),
        ({"PixelFormat": "Mono7"}, "the camera allows Mono8, "),
        ({"DeviceModelName": "x"}, "does not let DeviceModelName be set now"),
    ],
)
def test_refused_values(camera: Make, features: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        camera("pylon", index=0, features=features).open()


def test_the_camera_opens_again_and_again(camera: Make, grab: Grab) -> None:
    source = camera("pylon", index=1)
    for _ in range(3):
        source.open()
        grab(source, 2)
        source.close()
        source.close()
    assert source.info()["opened"] == 3
    with pytest.raises(CameraError, match="is not open"):
        source.grab(0.1)


def test_another_camera_in_the_same_place_is_not_taken_after_a_reopen(
    camera: Make, grab: Grab, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = camera("pylon", index=0)
    source.open()
    source.close()
    both = pylon._discover()
    moved = [(replace(device, index=place), info) for place, (device, info) in enumerate(reversed(both))]
    monkeypatch.setattr(pylon, "_discover", lambda: moved)
    source.open()
    assert source.info()["serial"] == "0815-0000"
    source.close()
    monkeypatch.setattr(pylon, "_discover", lambda: moved[:1])
    with pytest.raises(CameraError, match=r"0815-0000.* was opened first, does not answer"):
        source.open()


def test_what_comes_back_failed_of_a_removed_camera_is_no_frame(
    camera: Make, grab: Grab, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"ForceFailedBufferCount": 3, "ForceFailedBuffer": True}
    source = camera("pylon", serial="0815-0000", fps=50, features=table)
    source.open()
    monkeypatch.setattr(pylon.pylon.InstantCamera, "IsCameraDeviceRemoved", lambda _: True)
    with pytest.raises(CameraError, match="is lost: the device was removed"):
        grab(source)
