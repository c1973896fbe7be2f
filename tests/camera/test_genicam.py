"""GigE Vision against servers that speak it: Aravis' fake camera, and the library's own for exact packet loss."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import viva_genicam as vg
from harvesters.util.pfnc import dict_by_names
from viva_genicam.testing import FakeGigeCamera, FakeU3vCamera

from flawline.camera.camera import Camera
from flawline.camera.device_camera import Block
from flawline.camera.discovery import Device
from flawline.camera.features import FeatureMap
from flawline.camera.frame import Frame
from flawline.camera.genicam import GenicamCamera, VivaFeatures, list_devices
from flawline.camera.pixel_format import parse
from flawline.camera.pixels import to_rgb8
from flawline.config.errors import CameraError, ConfigError
from flawline.config.settings_camera import CameraSettings

CODES = dict_by_names | {"BayerRG14": 0x0110010A, "BayerGB14": 0x0110010B}  # harvesters' table is older
Make = Callable[..., Camera]
Grab = Callable[..., list[Frame]]


@pytest.fixture
def beside(fake_gige: Callable[..., object]) -> Iterator[Callable[[str], object]]:
    """Reads a feature of the one fake camera beside whoever controls it."""

    def read(name: str) -> object:
        [found] = vg.discover(500, all=True)
        with vg.connect_gige(found, monitor=True) as watcher:
            return watcher.feature_state(name).value

    return read


def test_list_names_what_answers(fake_gige: Callable[..., object]) -> None:
    fake_gige("-s", "FL42")
    [device] = [device for device in list_devices() if device.address == "127.0.0.1"]
    assert (device.vendor, device.model, device.serial, device.access) == ("Aravis", "Fake", "FL42", "free")


@pytest.mark.parametrize("choice", [{"serial": "FL42"}, {"address": "127.0.0.1"}, {"index": 0}, {}])
def test_chosen_camera_delivers_numbered_frames_in_utc(
    fake_gige: Callable[..., object], camera: Make, grab: Grab, choice: dict[str, object]
) -> None:
    fake_gige("-s", "FL42")
    source = camera("genicam", features={"Width": 256, "Height": 128}, fps=50, **choice)
    source.open()
    frames = grab(source, 10)
    assert all(frame.size == (128, 256) and frame.pixel_format == "Mono8" for frame in frames)
    ids = [frame.frame_id for frame in frames]
    assert ids == list(range(ids[0], ids[0] + 10))
    steps = np.diff([frame.t_grab for frame in frames])
    assert np.median(steps) == pytest.approx(20e6, rel=0.3)
    assert abs(frames[-1].t_grab - time.time_ns()) < 2e9
    info = source.info()
    assert (info["up"], info["serial"], info["clock"], info["missed"]) == (True, "FL42", "camera", 0)


def test_info_may_be_asked_by_another_thread_while_frames_come(
    fake_gige: Callable[..., object], camera: Make, grab: Grab
) -> None:
    fake_gige()
    source = camera("genicam", features={"Width": 64, "Height": 64}, fps=50)
    source.open()
    with ThreadPoolExecutor(1) as other:
        grabbing = other.submit(grab, source, 75)
        infos = []
        while not grabbing.done():
            infos.append(source.info())
            time.sleep(0.002)
        grabbing.result()
    assert infos[-1]["frames"] > infos[0]["frames"]
    assert infos[-1]["packets"] > 0


def test_numbers_of_16_bit_run_over_without_a_loss(fake_gige: Callable[..., object], camera: Make, grab: Grab) -> None:
    fake_gige()  # it begins at 65401
    source = camera("genicam", features={"Width": 16, "Height": 16}, fps=200)
    source.open()
    frames = grab(source, 160)
    ids = [frame.frame_id for frame in frames]
    assert 65535 in ids
    assert ids[-1] < 100
    lost = [frame.frame_id for frame in frames if frame.lost]
    assert source.info()["missed"] == len(lost)
    assert source.info()["renumbered"] == 0
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"Width": 100000}, r"features\.Width = 100000: out of range; the camera allows 1 to 2048"),
        ({"Width": 12.5}, "a whole number is needed"),
        ({"Width": True}, "a whole number is needed"),
        ({"ExposureTime": 1.0}, r"features\.ExposureTime = 1\.0: out of range; the camera allows 10 to 10000000"),
        ({"PixelFormat": "Mono7"}, r"the camera allows BayerBG8, .*Mono8"),
        ({"Gain": 3}, r"the camera has no feature 'Gain'; did you mean .*'GainRaw'"),
        ({"TestBoolean": "maybe"}, "allowed are true and false"),
        ({"SensorWidth": 3}, "does not let SensorWidth be set now"),
        ({"TriggerSoftware": 3}, "it is a command"),
    ],
)
def test_refused_values_are_named_with_what_is_allowed(
    fake_gige: Callable[..., object], camera: Make, features: dict[str, object], words: str
) -> None:
    fake_gige()
    with pytest.raises(ConfigError, match=f"camera 'top': .*{words}"):
        camera("genicam", features=features).open()


def test_features_reach_the_camera_by_old_and_new_names(
    fake_gige: Callable[..., object], camera: Make, beside: Callable[[str], object]
) -> None:
    fake_gige()
    table = {"ExposureTime": "1500", "GainRaw": 7.0, "TestBoolean": "true", "GainAuto": "Once", "OffsetX": 8}
    source = camera("genicam", features=table, fps=12)
    source.open()
    assert beside("ExposureTimeAbs") == pytest.approx(1500.0)
    assert beside("AcquisitionFrameRate") == pytest.approx(12.0, rel=0.01)
    assert [beside(name) for name in ("GainRaw", "TestBoolean", "GainAuto", "OffsetX")] == [7, True, "Once", 8]


def test_a_value_is_asked_of_the_camera_every_time(fake_gige: Callable[..., object]) -> None:
    fake_gige()
    [found] = vg.discover(500, all=True)
    with vg.connect_gige(found) as holder, vg.connect_gige(found, monitor=True) as watcher:
        seen = VivaFeatures(watcher)
        for width in (64, 128):
            holder.set_integer("Width", width)
            assert seen.read("Width") == width


def test_software_trigger_exposes_once_each_and_from_any_thread(
    fake_gige: Callable[..., object], camera: Make, grab: Grab, beside: Callable[[str], object]
) -> None:
    fake_gige()
    source = camera("genicam", trigger="software")
    source.open()
    assert source.grab(0.3) is None
    ids = []
    for _ in range(3):
        source.trigger()
        ids.append(grab(source)[0].frame_id)
    assert np.diff(ids).tolist() == [1, 1]
    assert source.grab(0.3) is None
    assert (beside("TriggerMode"), beside("TriggerSource")) == ("On", "Software")


@pytest.mark.parametrize(
    ("trigger", "features", "mode", "source"),
    [("hardware", {}, "On", "Line0"), ("hardware", {"TriggerSource": "Software"}, "On", "Software")],
)
def test_hardware_trigger_waits_for_a_line_unless_the_table_says_otherwise(
    fake_gige: Callable[..., object],
    camera: Make,
    beside: Callable[[str], object],
    trigger: str,
    features: dict[str, object],
    mode: str,
    source: str,
) -> None:
    fake_gige()
    waiting = camera("genicam", trigger=trigger, features=features)
    waiting.open()
    assert waiting.grab(0.3) is None
    assert (beside("TriggerMode"), beside("TriggerSource")) == (mode, source)
    with pytest.raises(CameraError, match="takes no software trigger"):
        waiting.trigger()


@pytest.mark.parametrize("name", ["Mono16", "BayerRG8", "BayerGB8", "RGB8"])
def test_pixel_formats_arrive_as_what_they_are(
    fake_gige: Callable[..., object], camera: Make, grab: Grab, name: str
) -> None:
    fake_gige()
    source = camera("genicam", features={"Width": 64, "Height": 48, "PixelFormat": name})
    source.open()
    [frame] = grab(source)
    assert frame.pixel_format == name
    assert frame.pixels is not None
    out = np.zeros((48, 64, 3), np.uint8)
    to_rgb8(frame.pixels, frame.pixel_format, out)
    assert out.std() > 5
    assert source.note is None


@pytest.mark.parametrize("name", ["Mono12p", "Mono10p", "Mono12Packed", "BayerGR12p", "BGR8", "YUV422_8"])
def test_packed_formats_equal_the_library_s_own_pictures(camera: Make, grab: Grab, name: str) -> None:
    with FakeGigeCamera(width=64, height=48, fps=30, pixel_format=name):
        source = camera("genicam")
        source.open()
        [frame] = grab(source)
        assert frame.pixels is not None
        out = np.zeros((*frame.size, 3), np.uint8)
        to_rgb8(frame.pixels, frame.pixel_format, out)
        source.close()
        [found] = vg.discover(500, all=True)
        with vg.connect_gige(found) as direct, direct.stream() as stream:
            theirs = stream.next_frame(5000).to_rgb8()
    assert out.shape == theirs.shape
    if "Bayer" not in name:  # the test picture stands still; demosaicing differs at edges
        assert np.abs(out.astype(int) - theirs).max() <= 1


class Sends(GenicamCamera):
    """A camera whose stream is the frames given, in the library's own form."""

    def __init__(self, *frames: vg.Frame, **keys: object) -> None:
        super().__init__(CameraSettings.model_validate({"name": "top", "backend": "genicam", **keys}))
        self._device = FakeU3vCamera(width=64, height=48, pixel_format="Mono8")
        self._frames = iter(frames)

    def connect(self) -> tuple[Device, FeatureMap]:
        self._camera = self._device.connect()
        return Device("genicam", 0, model="FakeU3v"), VivaFeatures(self._camera)

    def start(self) -> None:
        pass

    def receive(self, timeout_s: float) -> Block | None:
        self._stream = SimpleNamespace(
            next_frame=lambda _: next(self._frames), close=lambda: None, __exit__=lambda *_: None, stats=lambda: None
        )
        return super().receive(timeout_s)

    def counters(self) -> dict[str, int]:
        return {}


RARE = [
    "BayerRG14",
    "BayerGB14",
    "RGB10",
    "RGB12",
    "BGR14",
    "RGB16",
    "BGRa12",
    "YCbCr601_422_8",
    "YCbCr709_422_8_CbYCrY",
]


@pytest.mark.parametrize("name", RARE)
def test_formats_that_the_library_does_not_know_are_judged_all_the_same(grab: Grab, name: str) -> None:
    known = parse(name)
    values = np.random.default_rng(3).integers(0, 2**known.bits, (6, 8 * known.channels))
    data = np.pad(values.astype("<u2" if known.bits > 8 else np.uint8).view(np.uint8), ((0, 0), (0, 4))).reshape(-1)
    frame = vg.Frame.from_bytes(data.tobytes(), 8, 6, CODES[name], 4)
    assert frame.pixel_format.startswith("Unknown")
    with Sends(frame) as source:
        [seen] = grab(source)
        assert (seen.fault, seen.pixel_format, seen.size) == (None, name, (6, 8))
        assert seen.pixels is not None
        assert (np.asarray(seen.pixels).reshape(6, -1) == values).all()
        to_rgb8(seen.pixels, name, np.zeros((6, 8, 3), np.uint8))


def test_a_format_that_nobody_knows_came_whole_and_cannot_be_judged(grab: Grab) -> None:
    with Sends(vg.Frame.from_bytes(bytes(640), 8, 8, 0x8118_0F00)) as source:
        source.pixel_format = None  # as of a camera that does not let it be read
        [seen] = grab(source)
        assert "cannot be judged: pixel format 'Unknown(0x81180F00)' is not known" in (seen.fault or "")
        assert (source.info()["incomplete"], source.info()["unreadable"]) == (0, 1)


def test_incomplete_and_lost_frames_are_faults_of_their_own(camera: Make, grab: Grab) -> None:
    all_of_five = [(5, packet) for packet in range(400)]
    with FakeGigeCamera(width=320, height=240, fps=30, packet_resend=False, drop_packets=[(3, 2), *all_of_five]):
        source = camera("genicam", features={"GevSCPSPacketSize": 1500})
        source.open()
        frames = grab(source, 7)
        assert [frame.frame_id for frame in frames] == [1, 2, 3, 4, 5, 6, 7]
        faulty = {frame.frame_id: frame for frame in frames if frame.pixels is None}
        assert sorted(faulty) == [3, 5]
        assert all(frame.fault_reason == "camera_fault" for frame in faulty.values())
        assert "1 packets did not arrive" in (faulty[3].fault or "")
        assert "frame 5 was lost" in (faulty[5].fault or "")
        assert [faulty[3].lost, faulty[5].lost] == [False, True]
        info = source.info()
        assert (info["incomplete"], info["missed"]) == (1, 1)
        source.close()


def test_control_taken_away_is_a_lost_camera(camera: Make, grab: Grab) -> None:
    with FakeGigeCamera(width=64, height=48, fps=30) as fake:
        source = camera("genicam")
        source.open()
        grab(source, 2)
        fake.revoke_control()
        with pytest.raises(CameraError, match="control to another application"):
            grab(source, 1000, limit_s=20)
        source.close()


def test_wrong_address_and_serial_name_what_does_answer(fake_gige: Callable[..., object], camera: Make) -> None:
    fake_gige("-s", "FL42")
    with pytest.raises(CameraError, match=r"address = '10\.9\.8\.7'; cameras that do: Aravis Fake"):
        camera("genicam", address="10.9.8.7").open()
    with pytest.raises(CameraError, match=r"serial = 'X'; cameras that do: .*FL42"):
        camera("genicam", serial="X").open()


def test_a_second_master_is_refused_and_served_after_the_first(
    fake_gige: Callable[..., object], camera: Make, grab: Grab
) -> None:
    fake_gige()
    holder = (
        "import sys, viva_genicam as vg\n"
        "camera = vg.connect_gige(vg.discover(500, all=True)[0])\n"
        "print('holds', flush=True)\nsys.stdin.read()\ncamera.close()\n"
    )
    first = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "holds\n"
    source = camera("genicam")
    with pytest.raises(CameraError, match="access denied: another application controls Aravis Fake"):
        source.open()
    first.communicate(input="", timeout=30)
    source.open()
    grab(source, 2)


@pytest.mark.parametrize("trigger", ["free", "software"])
def test_a_pulled_cable_is_noticed_and_survived(
    fake_gige: Callable[..., object], camera: Make, grab: Grab, trigger: str
) -> None:
    fake = fake_gige()
    source = camera("genicam", trigger=trigger)
    source.open()
    if trigger == "software":
        source.trigger()
    grab(source, 1)
    fake.kill()
    with pytest.raises(CameraError, match="camera 'top': is lost"):
        grab(source, 1000)
    source.close()
    with pytest.raises(CameraError, match="no camera answers"):
        source.open()
    assert source.info()["up"] is False
    fake.start()
    source.open()
    if trigger == "software":
        source.trigger()
    grab(source, 1)
    assert source.info()["opened"] == 2


def test_a_hanging_camera_is_lost_too(fake_gige: Callable[..., object], camera: Make, grab: Grab) -> None:
    fake = fake_gige()
    source = camera("genicam")
    source.open()
    grab(source, 2)
    os.kill(fake.process.pid, signal.SIGSTOP)
    with pytest.raises(CameraError, match="camera 'top'"):
        grab(source, 1000, limit_s=60)


def test_a_camera_that_answers_but_does_not_send_has_stalled(
    fake_gige: Callable[..., object], camera: Make, grab: Grab
) -> None:
    fake_gige()
    source = camera("genicam", stall_s=1.5, features={"TriggerMode": "On"})  # free run, but told to wait
    source.open()
    with pytest.raises(CameraError, match=r"has sent no frame for 1\.5 s"):
        grab(source, 1, limit_s=20)


def test_usb3_vision_goes_the_same_way(grab: Grab) -> None:
    device = FakeU3vCamera(width=64, height=48, pixel_format="Mono8")

    class OnABusOfItsOwn(GenicamCamera):  # the library's fake is not on a USB bus, so it cannot be discovered
        def connect(self) -> tuple[Device, FeatureMap]:
            self._camera = device.connect()
            return Device("genicam", 0, model="FakeU3v"), VivaFeatures(self._camera)

    keys = {"name": "top", "backend": "genicam", "features": {"AcquisitionFrameRate": 50}}
    with OnABusOfItsOwn(CameraSettings.model_validate(keys)) as source:
        assert device.acquiring()
        frames = [frame for frame in grab(source, 10) if not frame.lost]
        source.check_alive()
        assert {(frame.size, frame.pixel_format) for frame in frames} == {((48, 64), "Mono8")}
        assert abs(frames[-1].t_grab - time.time_ns()) < 5e9
        assert source.info()["clock"] == "camera"
    assert not device.acquiring()
