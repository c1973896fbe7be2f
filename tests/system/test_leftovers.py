"""What a running agent has loaded, and what is left when it has stopped, or was killed and has started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from station import free_port
from tiny_bundle import write_tiny_bundle

from flawline.agent.control import ask
from flawline.config.errors import ConfigError

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def maps(pid: int) -> str:
    """Everything that a process has mapped, libraries and shared memory alike."""
    return Path(f"/proc/{pid}/maps").read_text()


def segments(*pids: int) -> set[str]:
    """Names in /dev/shm that these processes have mapped or hold open."""
    opened = [os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    mapped = [line.split(maxsplit=5)[-1] for pid in pids for line in maps(pid).splitlines()]
    return {name for name in opened + mapped if name.startswith("/dev/shm/")}


def start(config: Path, control: str) -> tuple[subprocess.Popen[bytes], int]:
    """An agent that takes triggers, and its worker's pid."""
    with (config.parent / "log").open("ab") as log:
        agent = subprocess.Popen([*CLI, "run", "--config", str(config)], stderr=log)
    end = time.monotonic() + 240
    while True:
        assert agent.poll() is None, (config.parent / "log").read_text()
        assert time.monotonic() < end, (config.parent / "log").read_text()
        try:
            status = ask(control, {"cmd": "status", "id": 1}, timeout_s=2)
        except ConfigError:
            continue
        if status["state"] == "running" and status["worker"]["ready"]:
            return agent, int(status["worker"]["pid"])
        time.sleep(0.2)


def test_the_agent_never_loads_torch_and_leaves_nothing(tmp_path: Path) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    control = f"ipc://{sockets}/control"
    config = tmp_path / "line.toml"
    config.write_text(
        f'[[cameras]]\nname = "belt"\nbackend = "simulated"\nfps = 5.0\n[cameras.simulated]\nwidth = 96\nheight = 64\n'
        f'[model]\nbundle = "{write_tiny_bundle(tmp_path / "tiny")}"\ndevice = "cpu"\nthreads = 1\n'
        f'[publish]\nendpoint = "ipc://{sockets}/verdicts"\n[control]\nendpoint = "{control}"\n'
        f'[journal]\npath = "state"\n[preview]\nport = {free_port()}\n[log]\nformat = "json"\n'
    )
    used: set[str] = set()
    agent, worker = start(config, control)
    try:
        assert {path.name for path in sockets.iterdir()} == {"verdicts", "control"}
        assert "libtorch_cpu.so" in maps(worker)
        assert "libtorch_" not in maps(agent.pid)
        assert "/memfd:flawline" in maps(agent.pid)  # the ring: memory without a name, which ends with its processes
        used |= segments(agent.pid, worker)
        agent.kill()
        agent.wait(30)
        agent, worker = start(config, control)  # in the same place, over whatever the dead one left
        used |= segments(agent.pid, worker)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(120) == 0
    finally:
        agent.kill()
    assert list(sockets.iterdir()) == []
    assert [name for name in used if Path(name).exists()] == []
    assert not Path(f"/proc/{worker}").exists()
