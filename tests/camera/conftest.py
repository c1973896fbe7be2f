"""Cameras that are real at the protocol: Aravis' GigE Vision server, Basler's emulation, an RTSP server."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from needs import need, need_command

os.environ["PYLON_CAMEMU"] = "2"  # read by pylon when it is first imported

from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.registry import make_camera
from flawline.config.settings_camera import CameraSettings

FAKE_GIGE = "arv-fake-gv-camera-0.8"


class FakeGige:
    """The fake GigE Vision camera at 127.0.0.1, a process that can be killed, stopped and started again."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it listens for commands."""
        command = [FAKE_GIGE, "-i", "127.0.0.1", *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not udp_port_is_bound(3956):
            assert self.process.poll() is None, "the fake camera ended"
            assert time.monotonic() < deadline, "the fake camera does not listen"
            time.sleep(0.05)

    def kill(self) -> None:
        """As if its cable were pulled."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def udp_port_is_bound(port: int) -> bool:
    """Looked up, not tried: a try would take the port away from who wants it."""
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    return any(int(line.split()[1].rpartition(":")[2], 16) == port for line in lines)


@pytest.fixture
def fake_gige() -> Iterator[Callable[..., FakeGige]]:
    """Starts fake cameras with the options given; all of them are gone afterwards."""
    need_command(FAKE_GIGE, "aravis-tools")
    started: list[FakeGige] = []

    def start(*options: str) -> FakeGige:
        fake = FakeGige(*options)
        started.append(fake)
        fake.start()
        return fake

    yield start
    for fake in started:
        fake.kill()


@pytest.fixture
def camera() -> Iterator[Callable[..., Camera]]:
    """Makes cameras from settings, not yet open; all of them are closed afterwards."""
    made: list[Camera] = []

    def make(backend: str, **keys: object) -> Camera:
        source = make_camera(CameraSettings.model_validate({"name": "top", "backend": backend, **keys}))
        made.append(source)
        return source

    yield make
    for source in made:
        source.close()


def grab(source: Camera, count: int = 1, limit_s: float = 30.0) -> list[Frame]:
    """The next `count` frames; fails after `limit_s`."""
    frames: list[Frame] = []
    deadline = time.monotonic() + limit_s
    while len(frames) < count:
        assert time.monotonic() < deadline, f"{len(frames)} of {count} frames came: {source.info()}"
        frame = source.grab(0.25)
        if frame is not None:
            frames.append(frame)
    return frames


@pytest.fixture(name="grab")
def grab_fixture() -> Callable[..., list[Frame]]:
    """`grab`, for tests."""
    return grab


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(name="free_port")
def free_port_fixture() -> Callable[[], int]:
    """`free_port`, for tests."""
    return free_port


@pytest.fixture(name="need")
def need_fixture() -> Callable[[object, str], None]:
    """`need`, for tests."""
    return need
