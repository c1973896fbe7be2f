"""GenTL with Viky, the producer that comes with the `genicam` wheel: three devices behind a real .cti file."""

from collections.abc import Callable
from pathlib import Path

import genicam
import numpy as np
import pytest

from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.gentl import list_devices
from flawline.camera.pixels import to_rgb8
from flawline.config.errors import CameraError, ConfigError

Make = Callable[..., Camera]
Grab = Callable[..., list[Frame]]
CTI = Path(genicam.__file__).parent / "viky.cti"


@pytest.fixture(autouse=True)
def _producer(need: Callable[[object, str], None]) -> None:
    need(CTI.is_file(), "the GenTL producer viky.cti of the genicam wheel")


def test_the_producer_s_devices_are_listed() -> None:
    assert [device.serial for device in list_devices(CTI)] == ["0", "1", "2"]


def test_two_devices_of_one_producer_at_once(camera: Make, grab: Grab) -> None:
    red = camera("gentl", cti=CTI, serial="0", features={"Width": 300}, fps=50)
    grey = camera("gentl", cti=CTI, serial="1", features={"PixelFormat": "Mono8"})
    red.open()
    grey.open()
    frames = grab(red, 5)
    assert [frame.frame_id for frame in frames] == [1, 2, 3, 4, 5]
    assert {(frame.size, frame.pixel_format) for frame in frames} == {((400, 300), "RGBa8")}
    [plain] = grab(grey)
    assert (plain.size, plain.pixel_format) == ((400, 400), "Mono8")
    assert plain.pixels is not None
    out = np.zeros((400, 400, 3), np.uint8)
    to_rgb8(plain.pixels, plain.pixel_format, out)
    assert (out[:, :, 0] == plain.pixels).all()
    assert out.std() > 0
    red.close()
    grab(grey, 3)
    red.open()
    assert [frame.frame_id for frame in grab(red, 2)] == [1, 2]


def test_a_device_that_is_held_is_refused_and_served_afterwards(camera: Make, grab: Grab) -> None:
    first, second = camera("gentl", cti=CTI, serial="2"), camera("gentl", cti=CTI, serial="2")
    first.open()
    with pytest.raises(CameraError, match="access denied"):
        second.open()
    first.close()
    second.open()
    grab(second, 2)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({}, ConfigError, "3 cameras answer; choose one"),
        ({"serial": "9"}, CameraError, "no gentl camera answers with serial = '9'"),
        ({"serial": "1", "features": {"Widht": 5}}, ConfigError, "did you mean 'Width'"),
        ({"serial": "1", "features": {"Width": 5}}, ConfigError, "the camera allows 100 to 800"),
        ({"serial": "1", "trigger": "software"}, ConfigError, "the camera has no TriggerMode"),
        ({"serial": "1", "trigger": "hardware", "fps": 3}, ConfigError, "the camera has no TriggerMode"),
    ],
)
def test_what_the_device_refuses(
    camera: Make, grab: Grab, keys: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"camera 'top': .*{words}"):
        camera("gentl", cti=CTI, **keys).open()
    again = camera("gentl", cti=CTI, serial="1")  # nothing was left held
    again.open()
    grab(again)


def test_files_that_are_no_producers(camera: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.cti"
    text.write_text("no library")
    other = CTI.parent / "_gentl.so"
    for cti, words in ((tmp_path / "none.cti", "is not a file"), (text, "cannot be loaded"), (other, "not a GenTL")):
        with pytest.raises(ConfigError, match=f"camera 'top': cti: .*{cti.name} .*{words}"):
            camera("gentl", cti=cti).open()
    with pytest.raises(ConfigError, match="needs `cti`"):
        camera("gentl")
