"""What systemd hears from a running agent, at a notification socket of our own."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from notify_socket import NotifySocket
from station import Make

from flawline.agent.notify import ServiceManager


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NotifySocket]:
    """A watchdog that wants to hear from the agent every 2 s."""
    listener = NotifySocket(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    yield listener
    listener.socket.close()


def test_ready_when_warm_then_fed_then_stopping(make_station: Make, systemd: NotifySocket) -> None:
    station = make_station({"top": [("good", 0)]}).start()
    systemd.until("READY=1")
    said = [line for _, line in systemd.lines]
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in said)
    assert "worker_ready" in station.log.read_text()
    # No trigger comes: an idle line makes progress.
    assert systemd.count("WATCHDOG=1", 4.0) >= 3
    assert any(line.startswith("STATUS=running") and "cameras up: top" in line for _, line in systemd.lines)
    environment = Path(f"/proc/{station.status()['worker']['pid']}/environ").read_bytes()
    assert b"NOTIFY_SOCKET" not in environment, "the worker must not speak for the agent"
    station.stop()
    systemd.receive(0.1)
    assert "STOPPING=1" in [line for _, line in systemd.lines]


def test_not_ready_before_every_camera_has_answered_but_the_start_is_extended(
    make_station: Make, systemd: NotifySocket
) -> None:
    station = make_station({"top": [("good", 0)], "side": [("good", 0)]})
    start = threading.Thread(target=station.start)
    start.start()
    while not station.log.exists() or '"starting"' not in station.log.read_text():
        time.sleep(0.005)
    (station.folder / "side").rename(station.folder / "away")  # gone while the models load, like a dead camera
    start.join(90)
    assert systemd.until("STATUS=degraded").endswith("waiting for the first answer of: side; cameras up: top")
    station.trigger("top", "A")
    assert station.until("verdict", 1)[0]["result"] == "pass"
    systemd.receive(3.0)
    said = [line for _, line in systemd.lines]
    assert "READY=1" not in said
    assert said.count("EXTEND_TIMEOUT_USEC=60000000") >= 4
    (station.folder / "away").rename(station.folder / "side")
    systemd.until("READY=1")
    station.stop()


def test_a_stopped_worker_starves_the_watchdog_until_it_goes_on(make_station: Make, systemd: NotifySocket) -> None:
    station = make_station({"top": [("good", 0)]}, "[worker]\nping_limit_s = 600.0\n").start()
    systemd.until("READY=1")
    worker = station.status()["worker"]["pid"]
    os.kill(worker, signal.SIGSTOP)
    assert "no progress: worker" in systemd.until("STATUS=")
    assert systemd.count("WATCHDOG=1", 4.0) == 0
    status = station.status()
    assert status["state"] == "degraded", "subscribers are told what the watchdog knows"
    assert status["no_progress"][0].startswith("worker (silent")
    os.kill(worker, signal.SIGCONT)
    systemd.until("WATCHDOG=1")
    assert "progress_again" in station.log.read_text()
    station.stop()


def test_an_abstract_socket_is_told_too() -> None:
    name = f"@flawline-test-{os.getpid()}"
    listener = NotifySocket(name)
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    manager = ServiceManager(environment)
    assert environment == {}
    assert manager.watchdog_s is None  # it was meant for another process
    manager.tell("READY=1", "STATUS=well")
    listener.receive(0.2)
    assert [line for _, line in listener.lines] == ["READY=1", "STATUS=well"]
    manager.close()
    listener.socket.close()


def test_nothing_is_said_outside_a_service() -> None:
    manager = ServiceManager({})
    assert not manager.there
    manager.tell("READY=1")
