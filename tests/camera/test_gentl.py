"""GenTL with Viky, the producer that comes with the `genicam` wheel: three devices behind a real .cti file."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import genicam
import numpy as np
import pytest
from genicam import gentl
from harvesters.core import ImageAcquirer
from harvesters.util.pfnc import Dictionary, dict_by_names
from numpy.typing import NDArray

from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.gentl import list_devices
from flawline.camera.pixel_format import parse
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


class Delivered:
    """A buffer as a producer hands it over; what it is not given, it does not tell."""

    def __init__(self, data: NDArray[np.uint8], complete: bool | None = True, **told: object) -> None:
        self._complete = complete
        self.raw_buffer = data.tobytes() + bytes(range(256)) * 4  # the rest is of an older picture
        self.size = len(self.raw_buffer)
        self.queued = 0
        self.parent = SimpleNamespace(queue_buffer=self._queue)
        self.tl_type = "Custom"
        self._told = {"payload_type": gentl.PAYLOADTYPE_INFO_IDS.PAYLOAD_TYPE_IMAGE, "size_filled": data.size, **told}

    def _queue(self, buffer: object) -> None:
        assert buffer is self
        self.queued += 1

    def is_complete(self) -> bool:
        if self._complete is None:
            raise gentl.NotAvailableException("is_incomplete")
        return self._complete

    def is_containing_chunk_data(self) -> bool:
        return False

    def __getattr__(self, name: str) -> object:
        if name not in self._told:
            raise gentl.NotAvailableException(name)
        return self._told[name]


@pytest.fixture
def delivered(camera: Make, grab: Grab, monkeypatch: pytest.MonkeyPatch) -> Callable[[Delivered], Frame]:
    """The frame that comes of a buffer which a camera of 400 x 400 in Mono8 is said to have sent."""
    buffers: list[Delivered] = []
    monkeypatch.setattr(ImageAcquirer, "_fetch", lambda *_, **__: buffers.pop() if buffers else None)
    source = camera("gentl", cti=CTI, serial="1", features={"PixelFormat": "Mono8", "Width": 400, "Height": 400})
    source.open()

    def deliver(buffer: Delivered) -> Frame:
        buffers.append(buffer)
        [frame] = grab(source)
        assert buffer.queued == 0  # its pixels are still looked at
        assert source.grab(0.01) is None
        assert buffer.queued == 1
        return frame

    return deliver


def as_rgb(frame: Frame) -> NDArray[np.uint8]:
    assert frame.pixels is not None, frame.fault
    out = np.zeros((*frame.size, 3), np.uint8)
    to_rgb8(frame.pixels, frame.pixel_format, out)
    return out


def packed(values: NDArray[np.uint16], name: str) -> NDArray[np.uint8]:
    """From the definitions: PFNC's `p` is one stream of bits, GigE Vision's `Packed` two pixels in three bytes."""
    bits, flat = parse(name).bits, values.reshape(-1)
    if name.endswith("p"):
        return np.packbits((flat[:, None] >> np.arange(bits)) & 1, bitorder="little")
    first, second, low = flat[::2], flat[1::2], bits - 8
    middle = (first & (2**low - 1)) | ((second & (2**low - 1)) << 4)
    return np.column_stack([first >> low, middle, second >> low]).astype(np.uint8).reshape(-1)


PACKED = [f"{kind}{bits}{end}" for kind in ("Mono", "BayerGR") for bits in (10, 12) for end in ("p", "Packed")]


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_picture_arrives_as_the_camera_sent_it(delivered: Callable[[Delivered], Frame], name: str) -> None:
    bits = parse(name).bits
    ramp = np.linspace(0, 2**bits - 1, 60 * 40).astype(np.uint16).reshape(40, 60)
    data = packed(ramp, name)
    assert (Dictionary.get_proxy(name).expand(data) == ramp.reshape(-1)).all()  # harvesters reads it so, too
    told = {"pixel_format": dict_by_names[name], "width": 60, "height": 40, "padding_x": 0, "frame_id": 7}
    frame = delivered(Delivered(np.pad(data, (0, 100)), **told))  # with chunk data behind it
    assert (frame.frame_id, frame.size, frame.pixel_format) == (7, (40, 60), name)
    expected = np.zeros((40, 60, 3), np.uint8)
    to_rgb8(ramp, name.removesuffix("p").removesuffix("Packed"), expected)
    assert (as_rgb(frame) == expected).all()


def test_the_picture_among_several_parts_is_taken(delivered: Callable[[Delivered], Frame]) -> None:
    kinds = gentl.PARTDATATYPE_IDS
    ramp = np.linspace(0, 4095, 60 * 40).astype(np.uint16).reshape(40, 60)
    data = packed(ramp, "Mono12p")
    depth = SimpleNamespace(data_type=kinds.PART_DATATYPE_3D_IMAGE, data_offset=0, data_size=64)
    picture = SimpleNamespace(
        data_type=kinds.PART_DATATYPE_2D_IMAGE,
        data_offset=64,
        data_size=data.size,
        data_format=dict_by_names["Mono12p"],
        width=60,
        height=40,
        x_padding=0,
    )
    told = {"payload_type": gentl.PAYLOADTYPE_INFO_IDS.PAYLOAD_TYPE_MULTI_PART, "frame_id": 1}
    frame = delivered(Delivered(np.pad(data, (64, 10)), parts=(depth, picture), **told))
    assert (as_rgb(frame)[:, :, 0] == np.rint(ramp * (255 / 4095))).all()
    frame = delivered(Delivered(data, parts=(depth,), **told))
    assert "no picture among them" in (frame.fault or "")


def test_lines_with_padding_and_a_picture_behind_a_head(delivered: Callable[[Delivered], Frame]) -> None:
    lines = np.random.default_rng(3).integers(0, 4096, (40, 64), dtype=np.uint16)
    data = np.pad(lines.reshape(-1).view(np.uint8), (32, 0))
    told = {"pixel_format": dict_by_names["Mono12"], "width": 60, "height": 40, "padding_x": 8, "image_offset": 32}
    frame = delivered(Delivered(data, frame_id=1, **told))
    assert frame.pixels is not None
    assert (frame.pixels == lines[:, :60]).all()


def test_what_the_producer_does_not_tell_is_asked_of_the_camera(delivered: Callable[[Delivered], Frame]) -> None:
    grey = np.random.default_rng(4).integers(0, 256, (400, 400), dtype=np.uint8)
    frame = delivered(Delivered(grey.reshape(-1), frame_id=1))
    assert (frame.size, frame.pixel_format) == ((400, 400), "Mono8")
    assert (as_rgb(frame)[:, :, 2] == grey).all()


@pytest.mark.parametrize(
    ("size", "told", "words"),
    [
        (3600, {"size_filled": 3599}, "need 3600 bytes, 3599 came"),
        (4800, {}, "60 x 40 pixels came in 4800 bytes: unpacked, and not in Mono12p"),
        (3600, {"payload_type": gentl.PAYLOADTYPE_INFO_IDS.PAYLOAD_TYPE_JPEG}, "no picture, but payload type 5"),
        (3800, {"padding_x": 2}, "2 bytes of padding after each line is not supported"),
    ],
)
def test_what_is_not_the_picture_that_was_announced_is_a_fault(
    delivered: Callable[[Delivered], Frame], size: int, told: dict[str, object], words: str
) -> None:
    announced = {"pixel_format": dict_by_names["Mono12p"], "width": 60, "height": 40, "frame_id": 9}
    frame = delivered(Delivered(np.zeros(size, np.uint8), **{**announced, **told}))
    assert (frame.frame_id, frame.pixels, frame.fault_reason) == (9, None, "camera_fault")
    assert words in (frame.fault or "")


def test_a_producer_need_tell_neither_a_number_nor_that_all_has_come(delivered: Callable[[Delivered], Frame]) -> None:
    grey = np.random.default_rng(4).integers(0, 256, (400, 400), dtype=np.uint8).reshape(-1)
    numbers = [delivered(Delivered(grey, complete=None)).frame_id for _ in range(3)]
    assert numbers == [1, 2, 3]
    assert "need 160000 bytes, 159999 came" in (delivered(Delivered(grey[:-1], complete=None)).fault or "")


def test_a_buffer_of_which_nothing_is_told_is_no_picture(delivered: Callable[[Delivered], Frame]) -> None:
    buffer = Delivered(np.zeros(160_000, np.uint8), complete=None, frame_id=1)
    del buffer._told["size_filled"]
    assert "delivered only a part of it" in (delivered(buffer).fault or "")
