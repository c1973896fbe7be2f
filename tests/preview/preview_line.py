"""A real agent with a folder camera: every picture shows the square that the no-op engine finds, and its number."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT = 640, 360
EDGE = HEIGHT // 10
CORNER = ((WIDTH - EDGE) // 2, (HEIGHT - EDGE) // 2)
PICTURES = 32
BIT = 48
"""Edge of the fields along the lower edge that write a picture's number in black and white."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def draw_pictures(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(7)
    for number in range(PICTURES):
        picture = cv2.GaussianBlur(rng.integers(60, 140, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 3)
        x, y = CORNER
        picture[y : y + EDGE, x : x + EDGE] = 255
        for bit in range(5):
            picture[HEIGHT - BIT :, bit * BIT : (bit + 1) * BIT] = 255 if number >> bit & 1 else 0
        cv2.imwrite(str(folder / f"{number:02}.png"), picture)


class Agent:
    """The program in a process of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.port = free_port()
        self.control = f"tcp://127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{self.port}"
        if not (folder / "pictures").exists():
            draw_pictures(folder / "pictures")
        (folder / "line.toml").write_text(
            '[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\nloop = true\nfps = 10\n'
            f'[publish]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n[control]\nendpoint = "{self.control}"\n'
            f'[journal]\npath = "state"\n[preview]\nport = {self.port}\n'
            '[worker]\nengine = "flawline.models.noop:NoopEngine"\n'
        )
        self._log = (folder / "log").open("w+")
        settings = [part for setting in more for part in ("--set", setting)]
        self.command = [sys.executable, "-c", "from flawline.agent.cli import main; main()", "run"]
        self.command += ["--config", str(folder / "line.toml"), *settings]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Agent":
        self.process = subprocess.Popen(self.command, stderr=self._log)
        return self

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def wait_ready(self) -> "Agent":
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            try:
                if self.get("/readyz")[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log())

    def metric(self, name: str) -> float:
        """The sum over all label values of one metric's samples."""
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(30) == 0, self.log()
        self._log.close()


def events(agent: Agent, seconds: float, headers: dict[str, str] | None = None) -> list[dict]:
    """What `/events` tells in so many seconds."""
    request = urllib.request.Request(agent.url + "/events", headers=headers or {})
    heard = []
    deadline = time.monotonic() + seconds
    with urllib.request.urlopen(request, timeout=20) as stream:
        while time.monotonic() < deadline:
            line = stream.readline()
            if line.startswith(b"data: "):
                heard.append(json.loads(line[6:]))
    return heard
