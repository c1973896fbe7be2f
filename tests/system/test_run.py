"""The real program from outside: pictures in, one verdict each at a subscriber of its own, nothing left behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flawline.agent.control import ask

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], str, Path]]:
    monkeypatch.setenv("LINE_UNDER_TEST", str(tmp_path))  # children inherit it: ours are told from others'
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(1)
    for number in range(60):
        cv2.imwrite(str(pictures / f"{number:02}.png"), rng.integers(0, 255, (48, 64, 3), np.uint8))
    (pictures / "05.png").write_bytes(b"broken")
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    config = tmp_path / "line.toml"
    config.write_text(
        f'[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\n'
        f'[publish]\nendpoint = "{endpoint}"\n[journal]\npath = "state"\n'
        f'[control]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n'
        f"[preview]\nport = {free_port()}\n"
        '[worker]\nengine = "flawline.models.noop:NoopEngine"\n'
    )
    yield [*CLI, "run", "--config", str(config)], endpoint, tmp_path
    assert not ours(tmp_path), "a process was left behind"


def subscriber(endpoint: str, count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*CLI, "subscribe", "--endpoint", endpoint, "--count", str(count), "--json"], stdout=subprocess.PIPE, text=True
    )
    time.sleep(2.0)  # it must be connecting before the agent binds, on a busy machine too
    return process


def test_one_verdict_for_every_picture_gapless_over_a_restart(line: tuple[list[str], str, Path]) -> None:
    run, endpoint, _ = line
    seqs: list[int] = []
    for _ in range(2):
        receiver = subscriber(endpoint, 60)
        done = subprocess.run([*run, "--frames", "60"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        verdicts = [json.loads(text) for text in receiver.communicate(timeout=20)[0].splitlines()]
        assert [verdict["frame_id"] for verdict in verdicts].count(5) == 1
        assert sorted(verdict["frame_id"] for verdict in verdicts) == list(range(60))
        wrong = [verdict for verdict in verdicts if verdict["result"] == "error"]
        assert [(verdict["frame_id"], verdict["reason"]) for verdict in wrong] == [(5, "bad_frame")]
        assert "05.png" in wrong[0]["detail"]
        seqs += [verdict["seq"] for verdict in verdicts]
    assert seqs == list(range(1, 121))


def test_sigterm_drains_and_a_killed_agent_takes_its_worker_along(line: tuple[list[str], str, Path]) -> None:
    run, _, folder = line
    with (folder / "log").open("w+") as text:
        agent = subprocess.Popen([*run, "--set", "cameras.top.loop=true", "--set", "cameras.top.fps=50"], stderr=text)
        wait_for(folder / "log", "worker_ready")
        time.sleep(0.5)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) == 0
    with (folder / "log").open("w+") as text:
        agent = subprocess.Popen(run, stderr=text)
        wait_for(folder / "log", "worker_ready")
        worker = int(json.loads(next(row for row in text_lines(folder / "log") if "worker_ready" in row))["pid"])
        agent.kill()
        agent.wait(10)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and running(worker):
        time.sleep(0.05)
    assert not running(worker)


def test_a_killed_worker_costs_no_verdict_and_replay_gives_them_all(line: tuple[list[str], str, Path]) -> None:
    run, _, folder = line
    control = f"tcp://127.0.0.1:{free_port()}"
    more = ["--set", "cameras.top.loop=true", "--set", "cameras.top.fps=100", "--set", f"control.endpoint={control}"]
    with (folder / "log").open("w+") as text:
        agent = subprocess.Popen([*run, *more], stderr=text)
        for restarts in range(2):
            status = wait_for_worker(control, restarts)
            time.sleep(0.3)
            os.kill(status["worker"]["pid"], signal.SIGKILL)
        wait_for_worker(control, 2)
        for request in ({"cmd": "nothing"}, {"cmd": "replay", "from_seq": "x"}, {"cmd": "replay", "from_seq": -1}):
            with pytest.raises(ValueError, match=r"cmd|from_seq"):
                ask(control, request)
        status = ask(control, {"cmd": "status", "id": 1})
        assert status["triggers"] - (status["pass"] + status["fail"] + status["error"]) <= 12
        done = subprocess.run(
            [*CLI, "replay", "--from-seq", "1", "--endpoint", control], capture_output=True, text=True, timeout=60
        )
        verdicts = [json.loads(row) for row in done.stdout.splitlines()]
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) == 0
    assert len(verdicts) >= status["last_seq"]
    assert [verdict["seq"] for verdict in verdicts] == list(range(1, len(verdicts) + 1))
    # An unreadable file is answered at once, so it may overtake the one before it, which is being judged.
    frames = [verdict["frame_id"] for verdict in verdicts]
    assert len(set(frames)) == len(frames), "a frame was answered twice"
    assert max(frames) - len(frames) <= 12, "a frame was left out"
    judged = [verdict["frame_id"] for verdict in verdicts if verdict["reason"] is None]
    assert judged == sorted(judged)
    assert {verdict["reason"] for verdict in verdicts} <= {None, "bad_frame", "worker_lost"}


@pytest.mark.parametrize("section", ["publish", "control"])
def test_a_port_in_use_is_one_line_and_exit_2(line: tuple[list[str], str, Path], section: str) -> None:
    run, _, _ = line
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        command = [*run, "--set", f"{section}.endpoint={endpoint}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{section}.endpoint: {endpoint}" in done.stderr


def test_what_cannot_work_is_one_line_and_exit_2(line: tuple[list[str], str, Path]) -> None:
    run, _, folder = line
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    for setting, said in (
        (f"journal.path={folder / 'file'}", "journal.path"),
        (f"cameras.top.path={folder / 'empty'}", "holds no pictures"),
        ("publish.endpoint=nonsense", "publish.endpoint"),
        ("worker.engine=flawline.nothing:Here", "worker.engine"),
        ("cameras.top.fsp=3", "did you mean 'fps'"),
    ):
        done = subprocess.run([*run, "--set", setting], capture_output=True, text=True, timeout=120)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr


def wait_for_worker(control: str, restarts: int) -> dict[str, Any]:
    """The status once the worker that came after so many restarts is ready."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = ask(control, {"cmd": "status", "id": 1}, timeout_s=30)
        if status["worker"]["ready"] and status["worker"]["restarts"] == restarts:
            return status
        time.sleep(0.05)
    raise AssertionError(f"no worker after {restarts} restarts")


def ours(folder: Path) -> list[str]:
    """Command lines of the processes that were started with this folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_text())
    return found


def text_lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def wait_for(file: Path, word: str) -> None:
    deadline = time.monotonic() + 30
    while word not in file.read_text():
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


HANGS = """
import time
from flawline.camera.folder import FolderCamera
grab = FolderCamera.grab
FolderCamera.grab = lambda camera, timeout_s: time.sleep(600) if camera.name == "side" else grab(camera, timeout_s)
from flawline.agent.cli import main; main()
"""


def test_a_driver_that_never_comes_back_does_not_keep_the_process(line: tuple[list[str], str, Path]) -> None:
    _, _, folder = line
    config = folder / "line.toml"
    config.write_text(config.read_text() + '[[cameras]]\nname = "side"\nbackend = "folder"\npath = "pictures"\n')
    command = [sys.executable, "-c", HANGS, "run", "--config", str(config), "--frames", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "left_hanging" in done.stdout + done.stderr


def test_numbers_that_no_journal_holds_are_wrong_usage() -> None:
    done = subprocess.run([*CLI, "replay", "--from-seq", "9" * 20], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--from-seq" in done.stderr


@pytest.mark.parametrize("key", ["publish.endpoint", "control.endpoint", "preview.host"])
def test_a_check_tells_of_a_door_left_open(line: tuple[list[str], str, Path], key: str) -> None:
    command, _, _ = line
    value = "0.0.0.0" if key == "preview.host" else "tcp://0.0.0.0:5555"
    section = key.split(".")[0]
    for more, code in (([], 2), (["--set", f"{section}.insecure=true"], 0)):
        done = subprocess.run(
            [*command, "--check", "--set", f"{key}={value}", *more], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        assert (key in done.stderr) == (code == 2)


@pytest.mark.parametrize("key", ["path", "bundle"])
def test_a_home_that_is_nobodys_is_wrong_usage(line: tuple[list[str], str, Path], key: str) -> None:
    command, _, folder = line
    config = folder / "line.toml"
    text = config.read_text()
    changed = text.replace('path = "pictures"', 'path = "~nobody-here/pictures"')
    config.write_text(changed if key == "path" else text + '[model]\nbundle = "~nobody-here/demo"\n')
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"{'cameras.top.path' if key == 'path' else 'model.bundle'}: ~nobody-here/" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("recipes.default.threshold=2", "recipes.default.threshold"), ("publish.endpoint=nonsense", "publish.endpoint")],
)
def test_in_a_service_the_last_line_is_one_of_the_log(line: tuple[list[str], str, Path], wrong: str, says: str) -> None:
    """Whether the settings do not load or the start refuses them."""
    run, _, folder = line
    with (folder / "journal").open("w+b") as journal:
        status = os.fstat(journal.fileno())
        environment = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        command = [*run, "--set", "publish.insecure=true", "--set", wrong]
        assert subprocess.run(command, stderr=journal, env=environment, timeout=60, check=False).returncode == 2
    last = (folder / "journal").read_text().splitlines()[-1]
    assert last.startswith("<3>{")
    event = json.loads(last.removeprefix("<3>"))
    assert (event["event"], event["level"], event["exit_code"]) == ("failed", "error", 2)
    assert says in event["error"]
