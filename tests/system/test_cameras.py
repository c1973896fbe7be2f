"""The real program with real camera protocols: a camera that goes and comes back, and pictures not worth judging."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zmq
from needs import need_command
from numpy.typing import NDArray

from flawline.agent.control import ask
from flawline.agent.wire import unpack

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]
FAKE = "arv-fake-gv-camera-0.8"


def start_fake() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([FAKE, "-i", "127.0.0.1", "-s", "FL42"], stdout=-3, stderr=-3)
    time.sleep(1.0)
    assert process.poll() is None
    return process


class Line:
    """One running agent, its log, and a subscriber to its verdicts."""

    def __init__(self, folder: Path, cameras: str, pictures: dict[str, NDArray[Any]] | None = None) -> None:
        self.folder = folder
        (folder / "pictures").mkdir()
        for name, picture in (pictures or {}).items():
            cv2.imwrite(str(folder / "pictures" / f"{name}.png"), picture)
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"verdict/")
        self.socket.setsockopt(zmq.RCVTIMEO, 120_000)
        self.socket.connect(f"ipc://{folder}/verdicts")
        (folder / "line.toml").write_text(
            f'{cameras}\n[publish]\nendpoint = "ipc://{folder}/verdicts"\n'
            f'[control]\nendpoint = "ipc://{folder}/control"\n[journal]\npath = "state"\n'
            '[preview]\nenabled = false\n[log]\nformat = "json"\n'
            '[worker]\nengine = "flawline.models.noop:NoopEngine"\n'
        )
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen([*CLI, "run", "--config", str(folder / "line.toml")], stderr=self.log)

    def verdicts(self, count: int, camera: str | None = None) -> list[dict[str, Any]]:
        """The next `count` verdicts, of one camera or of any."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            _, header = self.socket.recv_multipart()
            verdict = unpack(header)
            if camera in (None, verdict["camera"]):
                found.append(verdict)
        return found

    def drop_backlog(self) -> None:
        """Forget what has been published but not read."""
        while self.socket.poll(0):
            self.socket.recv_multipart()

    def ask(self, cmd: str, **request: Any) -> dict[str, Any]:
        """One command to the agent."""
        return ask(f"ipc://{self.folder}/control", {"cmd": cmd, "id": 1, **request}, timeout_s=60)

    def camera(self, name: str) -> dict[str, Any]:
        """A camera's own part of the status."""
        state: dict[str, Any] = self.ask("status")["cameras"][name]
        return state

    def wait_for(self, true: Callable[[], Any], limit_s: float = 120.0) -> None:
        """Until it is true."""
        end = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.1)

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "log").read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.log.close()
            self.context.destroy(linger=0)


@pytest.fixture
def fake() -> Iterator[list[subprocess.Popen[bytes]]]:
    need_command(FAKE, "aravis-tools")
    running = [start_fake()]
    yield running
    for process in running:
        process.kill()
        process.wait()


def test_a_camera_goes_and_comes_back_while_the_other_goes_on(
    tmp_path: Path, fake: list[subprocess.Popen[bytes]]
) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    line = Line(
        tmp_path,
        '[[cameras]]\nname = "gige"\nbackend = "genicam"\nserial = "FL42"\nfps = 10.0\n'
        "features = {Width = 64, Height = 64}\n"
        '[[cameras]]\nname = "other"\nbackend = "folder"\npath = "pictures"\nloop = true\nfps = 5.0\n',
        {"a": noise},
    )
    try:
        assert {verdict["result"] for verdict in line.verdicts(5, "gige")} <= {"pass", "fail"}
        fake[0].kill()
        fake[0].wait()
        deadline = time.monotonic() + 60
        while not line.events("camera_lost"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        line.drop_backlog()
        assert {verdict["result"] for verdict in line.verdicts(10, "other")} <= {"pass", "fail"}
        fake.append(start_fake())
        line.drop_backlog()
        back = line.verdicts(5, "gige")
        assert {verdict["result"] for verdict in back} <= {"pass", "fail"}
        numbers = [verdict["seq"] for verdict in line.verdicts(10)]
        assert numbers == list(range(numbers[0], numbers[0] + 10))
    finally:
        line.close()
    assert line.process.returncode == 0
    [lost] = line.events("camera_lost")
    assert lost["camera"] == "gige"
    assert "is lost" in lost["error"]
    assert len(line.events("camera_back")) == 1


def test_a_camera_that_answers_but_sends_nothing_is_lost_once_and_backs_off(
    tmp_path: Path, fake: list[subprocess.Popen[bytes]]
) -> None:
    line = Line(
        tmp_path,
        '[[cameras]]\nname = "gige"\nbackend = "genicam"\nserial = "FL42"\nstall_s = 1\n'
        'features = {TriggerMode = "On"}\n',  # free run, but told to wait: it opens, and sends nothing
    )
    try:
        line.wait_for(lambda: line.events("camera_lost"))
        ups, end = [], time.monotonic() + 60
        while (state := line.camera("gige"))["device"]["opened"] < 4:
            assert time.monotonic() < end
            ups.append((state["up"], state["state"]))
            time.sleep(0.1)
    finally:
        line.close()
    assert set(ups) == {(False, "lost")}
    assert len(ups) > 10
    assert len(line.events("camera_open")) == len(line.events("camera_lost")) == 1
    assert line.events("camera_back") == []


def test_a_trigger_without_a_frame_is_said_once_when_it_starts_and_once_when_it_ends(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    line = Line(
        tmp_path,
        '[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\ntrigger = "software"\n'
        "trigger_timeout_ms = 300\n",
        {"a": noise},
    )

    def inspect() -> tuple[str, str | None]:
        line.wait_for(lambda: line.camera("top")["up"])
        line.ask("trigger", camera="top")
        [verdict] = line.verdicts(1)
        return verdict["result"], verdict["reason"]

    try:
        line.wait_for(lambda: (tmp_path / "control").exists() and line.ask("status")["state"] == "running")
        good = inspect()
        assert good[0] in ("pass", "fail")
        missed = [inspect() for _ in range(3)]  # there is no second picture
        assert missed == [("error", "camera_fault")] * 3
        assert "no frame from 'top'" in line.camera("top")["error"]
        cv2.imwrite(str(tmp_path / "pictures" / "b.png"), noise[::-1])
        assert inspect() == good or inspect() == good  # the folder is looked through when it is opened
        assert line.camera("top")["error"] is None
    finally:
        line.close()
    assert len(line.events("camera_out_of_step")) == len(line.events("camera_in_step")) == 1


def test_pictures_that_no_one_should_judge_are_bad_frames_with_the_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8)
    pictures = {
        "1-good": noise,
        "2-black": noise // 64,
        "3-white": np.full_like(noise, 255),
        "4-small": noise[:30],
        "5-soft": cv2.GaussianBlur(noise, (0, 0), 5),
        "6-good": noise[::-1],
    }
    guard = "[cameras.guard]\nwidth = 80\nheight = 60\nsharpness = 0.3\n"
    line = Line(tmp_path, f'[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\n{guard}', pictures)
    try:
        verdicts = line.verdicts(6)
    finally:
        line.close()
    # What is not judged is answered at once, so it may overtake the picture before it: by the camera's own numbers.
    verdicts.sort(key=lambda verdict: int(verdict["frame_id"]))
    assert [verdict["frame_id"] for verdict in verdicts] == list(range(6))
    results = [(verdict["result"], verdict["reason"]) for verdict in verdicts]
    refused = ("error", "bad_frame")
    assert results[1:5] == [refused] * 4
    assert all(result in ("pass", "fail") for result, _ in (results[0], results[5]))
    texts = [json.dumps(verdict) for verdict in verdicts[1:5]]
    for text, word in zip(texts, ("black:", "saturated:", "wrong size: 80 x 30", "out of focus:"), strict=True):
        assert word in text


def test_a_frozen_picture_is_judged_once_and_never_passes_again(tmp_path: Path) -> None:
    first, second = np.random.default_rng(1).integers(0, 255, (2, 48, 64, 3), np.uint8)
    order = [first, first, first, second, first]
    line = Line(
        tmp_path,
        '[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\n[cameras.guard]\nfrozen_after = 2\n',
        {str(number): picture for number, picture in enumerate(order)},
    )
    try:
        verdicts = sorted(line.verdicts(5), key=lambda verdict: int(verdict["frame_id"]))
    finally:
        line.close()
    assert [verdict["reason"] for verdict in verdicts] == [None, "bad_frame", "bad_frame", None, None]
    assert "frozen: the last 3 pictures are the same, bit by bit" in verdicts[2]["detail"]


def test_bits_that_are_lost_are_said_once_and_shown(tmp_path: Path) -> None:
    deep = np.random.default_rng(1).integers(0, 65535, (6, 48, 64), np.uint16)
    pictures: dict[str, NDArray[Any]] = {str(number): deep[number] for number in range(5)}
    line = Line(
        tmp_path,
        '[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\n',
        pictures | {"5": deep[5].astype(np.uint8)},
    )
    try:
        line.verdicts(6)
        device = line.camera("top")["device"]
    finally:
        line.close()
    assert (device["pixel_format"], device["note"]) == ("Mono8", None)  # of the last one
    [said] = line.events("camera_depth")
    assert (said["camera"], said["pixel_format"]) == ("top", "Mono16")
    assert said["note"] == "Mono16 is judged at 8 bit: the lowest 8 of 16 bits are rounded away"


def test_a_feature_that_the_camera_has_not_is_a_wrong_configuration(
    tmp_path: Path, fake: list[subprocess.Popen[bytes]]
) -> None:
    line = Line(tmp_path, '[[cameras]]\nname = "gige"\nbackend = "genicam"\nserial = "FL42"\nfeatures = {Widht = 64}\n')
    try:
        assert line.process.wait(120) == 2
    finally:
        line.close()
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith(
        "flawline: camera 'gige': features.Widht: the camera has no feature 'Widht'; did you mean 'W"
    )
