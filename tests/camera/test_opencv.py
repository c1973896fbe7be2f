"""Video files, HTTP and RTSP streams that are really served, cut off, stalled and served again."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from flawline.camera.camera import Camera, EndOfFrames
from flawline.camera.frame import Frame
from flawline.camera.opencv import list_devices
from flawline.camera.pixels import to_rgb8
from flawline.camera.stream_format import note_of_tag
from flawline.config.errors import CameraError, ConfigError

Make = Callable[..., Camera]
Grab = Callable[..., list[Frame]]
SYSTEM_PYTHON = Path("/usr/bin/python3")


def brightness(frame: Frame) -> int:
    assert frame.pixels is not None
    out = np.zeros((*frame.size, 3), np.uint8)
    to_rgb8(frame.pixels, frame.pixel_format, out)
    return round(float(out[8:-8, 8:-8, 1].mean()))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Five frames of 64 x 48, each brighter than the one before: 20, 60, 100, 140, 180."""
    path = tmp_path / "parts.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(5):
        writer.write(np.full((48, 64, 3), 20 + 40 * number, np.uint8))
    writer.release()
    return path


def test_a_file_gives_every_frame_once_and_goes_on_where_it_was(camera: Make, grab: Grab, video: Path) -> None:
    source = camera("opencv", path=video)
    assert source.patient
    source.open()
    first = grab(source, 2)
    source.close()
    source.open()
    rest = grab(source, 3)
    assert [frame.frame_id for frame in first + rest] == [1, 2, 3, 4, 5]
    assert [brightness(frame) for frame in first + rest] == pytest.approx([20, 60, 100, 140, 180], abs=3)
    with pytest.raises(EndOfFrames):
        source.grab(0.1)


def test_a_file_in_a_loop_by_command_and_at_a_rate(camera: Make, grab: Grab, video: Path) -> None:
    looped = camera("opencv", path=video, loop=True)
    looped.open()
    assert [brightness(frame) for frame in grab(looped, 7)][5:] == pytest.approx([20, 60], abs=3)
    asked = camera("opencv", path=video, trigger="software")
    asked.open()
    assert asked.grab(0.05) is None
    asked.trigger()
    assert brightness(grab(asked)[0]) == pytest.approx(20, abs=3)
    assert asked.grab(0.05) is None
    slow = camera("opencv", path=video, fps=10)
    slow.open()
    began = time.monotonic()
    grab(slow, 5)
    assert time.monotonic() - began > 0.35


def test_a_file_of_16_bit_says_that_they_are_lost(camera: Make, grab: Grab, tmp_path: Path, video: Path) -> None:
    deep = tmp_path / "deep.mkv"
    form = [cv2.VIDEOWRITER_PROP_DEPTH, cv2.CV_16U, cv2.VIDEOWRITER_PROP_IS_COLOR, 0]
    writer = cv2.VideoWriter(str(deep), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"FFV1"), 10, (64, 48), form)
    for number in range(3):
        writer.write(np.full((48, 64), 300 * number, np.uint16))
    writer.release()
    source = camera("opencv", path=deep)
    source.open()
    assert grab(source)[0].pixel_format == "BGR8"
    assert source.note == "its 16 bits arrive as 8: the lowest 8 are lost"
    plain = camera("opencv", path=video)
    plain.open()
    assert plain.note == "the source carries colour at half the width and height"


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        (
            b"Y3\x0b\x0a",
            "its 10 bits arrive as 8: the lowest 2 are lost, and colour comes at half the width and height",
        ),
        (b"\x0c\x0a3Y", "its 12 bits arrive as 8: the lowest 4 are lost, and colour comes at half the width"),
        (b"Y1\x00\x0a", "its 10 bits arrive as 8: the lowest 2 are lost"),
        (b"Y16 ", "its 16 bits arrive as 8: the lowest 8 are lost"),
        (b"YUYV", "the source carries colour at half the width"),
        (b"BGR3", None),
        (b"GREY", None),
        (b"MJPG", "OpenCV makes 8-bit BGR of it and does not tell how deep MJPG is"),
        (b"\0\0\0\0", "OpenCV makes 8-bit BGR of it and does not tell how deep the source is"),
        (b"\xff\xff\xff\xff", "OpenCV makes 8-bit BGR of it and does not tell how deep the source is"),
    ],
)
def test_what_a_decoded_picture_has_lost_is_told_from_the_source_s_tag(tag: bytes, words: str | None) -> None:
    assert note_of_tag(int.from_bytes(tag, "little")) == words


class MjpegServer:
    """Serves one changing picture as multipart JPEG; can fall silent, and cut its viewers off."""

    def __init__(self, port: int) -> None:
        outer = self
        self.silent = self.cut = False
        self.level = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                while not outer.cut:
                    if not outer.silent:
                        outer.level = (outer.level + 10) % 250
                        picture = np.full((48, 64, 3), outer.level, np.uint8)
                        data = cv2.imencode(".jpg", picture)[1].tobytes()
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                        self.wfile.write(head.encode() + data + b"\r\n")
                    time.sleep(0.03)

            def log_message(self, *_: object) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the viewer has gone
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{port}/video"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.cut = True
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mjpeg(free_port: Callable[[], int]) -> Iterator[MjpegServer]:
    server = MjpegServer(free_port())
    yield server
    server.close()


def test_an_http_stream_that_stalls_is_lost_and_found_again(camera: Make, grab: Grab, mjpeg: MjpegServer) -> None:
    source = camera("opencv", url=mjpeg.url, stall_s=2)
    source.open()
    frames = grab(source, 10)
    assert [frame.frame_id for frame in frames] == list(range(1, 11))
    assert frames[0].size == (48, 64)
    taken = [frame for frame in frames if not frame.lost]  # a busy machine drops some
    assert len({brightness(frame) for frame in taken}) == len(taken)
    mjpeg.silent = True
    with pytest.raises(CameraError, match=r"camera 'top': .*(has sent no frame|cut off)"):
        grab(source, 1000)
    source.close()
    mjpeg.silent = False
    source.open()
    assert grab(source, 2)[0].frame_id > 10
    assert source.info()["opened"] == 2


def test_a_stream_that_is_cut_off_says_so(camera: Make, grab: Grab, mjpeg: MjpegServer) -> None:
    source = camera("opencv", url=mjpeg.url, stall_s=5)
    source.open()
    grab(source, 2)
    mjpeg.cut = True
    with pytest.raises(CameraError, match="has ended or was cut off"):
        grab(source, 1000)


def test_a_slow_reader_loses_the_oldest_frames_and_each_is_answered(
    camera: Make, grab: Grab, mjpeg: MjpegServer
) -> None:
    source = camera("opencv", url=mjpeg.url)
    source.open()
    [first] = grab(source, 1)
    time.sleep(1.5)
    began = time.time_ns()
    frames = grab(source, 1)
    while frames[-1].lost:
        frames += grab(source, 1)
    dropped, taken = frames[:-1], frames[-1]
    assert len(dropped) > 5
    assert {(frame.pixels, frame.fault_reason) for frame in dropped} == {(None, "overrun")}
    assert "was dropped" in (dropped[0].fault or "")
    assert [frame.frame_id for frame in frames] == [first.frame_id + 1 + n for n in range(len(frames))]
    assert began - taken.t_grab < 1.0e9
    assert brightness(taken) != brightness(first)
    source.close()
    source.open()
    grab(source, 1)
    assert source.info()["missed"] >= len(dropped)  # since the program started


def test_a_stream_that_is_thinned_out_is_owed_nothing_for_what_it_skips(
    camera: Make, grab: Grab, mjpeg: MjpegServer
) -> None:
    source = camera("opencv", url=mjpeg.url, fps=5)
    source.open()
    grab(source, 2)
    time.sleep(1.0)
    frames = grab(source, 4)
    assert not any(frame.lost for frame in frames)
    info = source.info()
    assert info["skipped"] > 5
    assert info["missed"] > 5


def test_a_software_trigger_takes_the_next_frame_that_arrives(camera: Make, grab: Grab, mjpeg: MjpegServer) -> None:
    source = camera("opencv", url=mjpeg.url, trigger="software")
    source.open()
    assert source.grab(0.3) is None
    asked = time.time_ns()
    source.trigger()
    [frame] = grab(source)
    assert frame.t_grab >= asked
    assert source.grab(0.3) is None


def test_triggers_do_not_outlive_the_camera_that_was_open(
    camera: Make, grab: Grab, mjpeg: MjpegServer, video: Path
) -> None:
    for source in (
        camera("opencv", url=mjpeg.url, trigger="software"),
        camera("opencv", path=video, trigger="software"),
    ):
        source.open()
        source.trigger()
        source.trigger()
        grab(source)
        source.close()
        source.open()
        assert source.grab(0.5) is None
        source.trigger()
        grab(source)


def test_a_device_is_listed_by_the_number_that_opens_it(tmp_path: Path) -> None:
    for name, model in {"video2": "Microscope", "video10": "Webcam", "v4l-subdev0": "Sensor", "video4": ""}.items():
        (tmp_path / name).mkdir()
        if model:
            (tmp_path / name / "name").write_text(f"{model}\n")
    found = [(device.index, device.model, device.address) for device in list_devices(tmp_path)]
    assert found == [(2, "Microscope", "/dev/video2"), (4, "", "/dev/video4"), (10, "Webcam", "/dev/video10")]


@pytest.fixture
def rtsp(
    need: Callable[[object, str], None], free_port: Callable[[], int]
) -> Iterator[tuple[str, Callable[[], subprocess.Popen[str]]]]:
    probe = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    there = SYSTEM_PYTHON.exists() and subprocess.run([SYSTEM_PYTHON, "-c", probe], capture_output=True).returncode == 0
    need(there, "gir1.2-gst-rtsp-server-1.0 with gstreamer1.0-plugins-ugly")
    port = free_port()
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        script = Path(__file__).with_name("rtsp_server.py")
        process = subprocess.Popen([SYSTEM_PYTHON, script, str(port)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        return process

    yield f"rtsp://127.0.0.1:{port}/line", start
    for process in started:
        process.kill()
        process.wait()


def test_rtsp_is_cut_off_refused_served_again_and_stalls(
    camera: Make, grab: Grab, rtsp: tuple[str, Callable[[], subprocess.Popen[str]]]
) -> None:
    url, start = rtsp
    server = start()
    source = camera("opencv", url=url, stall_s=8)
    source.open()
    frames = grab(source, 5)
    assert {frame.size for frame in frames if not frame.lost} == {(240, 320)}
    assert frames[-1].pixels is not None
    assert frames[-1].pixels.std() > 30  # colour bars, not a grey screen
    server.kill()
    server.wait()
    with pytest.raises(CameraError, match=r"cut off|no frame"):
        grab(source, 1000)
    source.close()
    with pytest.raises(CameraError, match=r"rtsp://127\.0\.0\.1.* cannot be opened"):
        source.open()
    server = start()
    source.open()
    grab(source, 2)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(CameraError, match=r"cut off|no frame"):
        grab(source, 1000)


def test_sources_that_are_wrong_or_missing(camera: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs one of url, path and index, not 0"):
        camera("opencv")
    with pytest.raises(ConfigError, match="needs one of url, path and index, not 2"):
        camera("opencv", index=0, url="rtsp://127.0.0.1/x")
    with pytest.raises(ConfigError, match="is not a file"):
        camera("opencv", path=tmp_path / "none.avi")
    with pytest.raises(ConfigError, match="no hardware trigger"):
        camera("opencv", index=0, trigger="hardware")
    with pytest.raises(ConfigError, match="features are for V4L2 devices"):
        camera("opencv", url="rtsp://127.0.0.1/x", features={"Gain": 1})
    with pytest.raises(CameraError, match="/dev/video97 cannot be opened"):
        camera("opencv", index=97).open()
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(CameraError, match="cannot be opened"):
        camera("opencv", path=tmp_path / "text.avi").open()


class V4l2Device:
    """cv2.VideoCapture on a webcam, as OpenCV's V4L2 backend behaves.

    A width waits for its height, and the other way round; then the stream begins anew and the driver takes the nearest
    size that it has. `get` tells what the driver has. The exposure is the driver's own until it is told otherwise.
    """

    sizes = ((640, 480), (1280, 720), (1920, 1080))

    def __init__(self, source: str, backend: int) -> None:
        assert (source, backend) == ("/dev/video3", cv2.CAP_V4L2)
        self.size, self.rate = (640, 480), 30.0
        self.waiting: dict[int, float] = {}
        self.controls = {cv2.CAP_PROP_AUTO_EXPOSURE: 3.0, cv2.CAP_PROP_EXPOSURE: 157.0, cv2.CAP_PROP_GAIN: 10.0}

    def isOpened(self) -> bool:
        return True

    def set(self, number: int, value: float) -> bool:
        if number in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT):
            self.waiting[number] = value
            if len(self.waiting) == 2:
                width, height = self.waiting[cv2.CAP_PROP_FRAME_WIDTH], self.waiting[cv2.CAP_PROP_FRAME_HEIGHT]
                self.size = min(self.sizes, key=lambda size: abs(size[0] - width) + abs(size[1] - height))
                self.waiting, self.rate = {}, 30.0
        elif number == cv2.CAP_PROP_FPS:
            self.rate = min((10.0, 15.0, 29.97), key=lambda rate: abs(rate - value))
        elif number in self.controls:
            locked = number == cv2.CAP_PROP_EXPOSURE and self.controls[cv2.CAP_PROP_AUTO_EXPOSURE] != 1
            self.controls[number] = self.controls[number] if locked else max(1.0, float(round(value)))
        return True

    def get(self, number: int) -> float:
        told = {
            cv2.CAP_PROP_FRAME_WIDTH: float(self.size[0]),
            cv2.CAP_PROP_FRAME_HEIGHT: float(self.size[1]),
            cv2.CAP_PROP_FPS: self.rate,
            cv2.CAP_PROP_FOURCC: float(cv2.VideoWriter.fourcc(*"YUYV")),
        }
        return (told | self.controls).get(number, -1.0)

    def read(self) -> tuple[bool, np.ndarray]:
        time.sleep(0.01)
        return True, np.zeros((self.size[1], self.size[0], 3), np.uint8)

    def release(self) -> None:
        pass


@pytest.mark.parametrize(
    ("features", "size"),
    [
        ({"Width": 1280, "Height": 720, "ExposureTime": 5000.0}, (720, 1280)),  # the manual's own example
        ({"AcquisitionFrameRate": 15, "Height": "1080", "Gain": 20, "Width": 1920}, (1080, 1920)),
        ({"Width": 640}, (480, 640)),
        ({"Height": 480, "AcquisitionFrameRate": 10}, (480, 640)),
        ({"AcquisitionFrameRate": 30.0}, (480, 640)),
        ({}, (480, 640)),
    ],
)
def test_a_webcam_takes_its_size_and_the_rest(
    camera: Make, grab: Grab, monkeypatch: pytest.MonkeyPatch, features: dict[str, object], size: tuple[int, int]
) -> None:
    made: list[V4l2Device] = []

    def capture(source: str, backend: int) -> V4l2Device:
        made.append(V4l2Device(source, backend))
        return made[-1]

    monkeypatch.setattr(cv2, "VideoCapture", capture)
    source = camera("opencv", index=3, features=features)
    source.open()
    assert grab(source)[0].size == size
    [device] = made
    assert device.rate == pytest.approx(features.get("AcquisitionFrameRate", 30.0), rel=0.002)
    assert device.controls[cv2.CAP_PROP_EXPOSURE] == features.get("ExposureTime", 15700.0) / 100
    assert device.controls[cv2.CAP_PROP_GAIN] == features.get("Gain", 10.0)
    assert source.note == "the source carries colour at half the width"


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"Width": 1400, "Height": 900}, r"features\.Width = 1400: /dev/video3 takes 1280 instead"),
        ({"Height": 720}, r"features\.Height = 720: /dev/video3 takes 480 instead"),
        (
            {"Gain": 5, "AcquisitionFrameRate": 60},
            r"features\.AcquisitionFrameRate = 60: /dev/video3 takes 29.97 instead",
        ),
        ({"AcquisitionFrameRate": 9.2}, r"features\.AcquisitionFrameRate = 9\.2: /dev/video3 takes 10 instead"),
        ({"ExposureTime": 30.0}, r"features\.ExposureTime = 30\.0: /dev/video3 takes 100 instead"),
        ({"ExposureTime": 260.0}, r"features\.ExposureTime = 260\.0: /dev/video3 takes 300 instead"),
        ({"Gain": 0.4}, r"features\.Gain = 0\.4: /dev/video3 takes 1 instead"),
        ({"Width": 641}, r"features\.Width = 641: /dev/video3 takes 640 instead"),
        ({"Width": "wide"}, r"features\.Width = 'wide': a number is needed"),
        ({"Gamma": 1}, r"features\.Gamma: backend 'opencv' knows Width, Height, "),
    ],
)
def test_a_webcam_that_takes_something_else_is_refused(
    camera: Make, monkeypatch: pytest.MonkeyPatch, features: dict[str, object], words: str
) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", V4l2Device)
    with pytest.raises(ConfigError, match=f"camera 'top': {words}"):
        camera("opencv", index=3, features=features).open()
