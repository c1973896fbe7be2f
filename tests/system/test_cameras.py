"""The real program with real camera protocols: a camera that goes and comes back, and pictures not worth judging."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zmq
from needs import need_command

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

    def __init__(self, folder: Path, cameras: str) -> None:
        self.folder = folder
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
    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "pictures" / "a.png"), noise)
    line = Line(
        tmp_path,
        '[[cameras]]\nname = "gige"\nbackend = "genicam"\nserial = "FL42"\nfps = 10.0\n'
        "features = {Width = 64, Height = 64}\n"
        '[[cameras]]\nname = "other"\nbackend = "folder"\npath = "pictures"\nloop = true\nfps = 5.0\n',
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


def test_pictures_that_no_one_should_judge_are_bad_frames_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8)
    for name, picture in {
        "1-good": noise,
        "2-black": noise // 64,
        "3-white": np.full_like(noise, 255),
        "4-small": noise[:30],
        "5-soft": cv2.GaussianBlur(noise, (0, 0), 5),
        "6-good": noise[::-1],
    }.items():
        cv2.imwrite(str(folder / f"{name}.png"), picture)
    guard = "[cameras.guard]\nwidth = 80\nheight = 60\nsharpness = 0.3\n"
    line = Line(tmp_path, f'[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\n{guard}')
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
