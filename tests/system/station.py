"""A whole agent for a test: its configuration, its process, a subscriber and a client of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgpack
import zmq
from scripted_engine import write_order

from flawline.agent.control import ask
from flawline.config.errors import ConfigError

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]
HERE = Path(__file__).parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Station:
    """Cameras replay orders for the scripted engine (see there): `cameras` maps names to (kind, wait_ms) lists.

    Topics and headers arrive in `messages`; nothing in here trusts the agent's own counters.
    """

    def __init__(self, folder: Path, cameras: dict[str, list[tuple[str, int]]], more: str = "", **camera: Any) -> None:
        self.folder = folder
        self.publish = f"tcp://127.0.0.1:{free_port()}"
        self.control = f"tcp://127.0.0.1:{free_port()}"
        self.ledger = folder / "ledger"
        self.log = folder / "log"
        self.messages: list[tuple[str, dict[str, Any], bytes | None]] = []
        self.process: subprocess.Popen[bytes] | None = None
        text = "".join(self._camera(name, orders, camera) for name, orders in cameras.items())
        text += f'[publish]\nendpoint = "{self.publish}"\n[control]\nendpoint = "{self.control}"\n'
        self.page = f"http://127.0.0.1:{(port := free_port())}"
        text += f'[journal]\npath = "state"\n[preview]\nport = {port}\n'
        self.config = folder / "line.toml"
        self.config.write_text(text + more)
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.setsockopt(zmq.SUBSCRIBE, b"")
        self._sub.setsockopt(zmq.RECONNECT_IVL, 20)
        self._sub.connect(self.publish)

    def _camera(self, name: str, orders: list[tuple[str, int]], settings: dict[str, Any]) -> str:
        pictures = self.folder / name
        pictures.mkdir(parents=True, exist_ok=True)
        for number, (kind, wait_ms) in enumerate(orders):
            write_order(pictures / f"{number:04}.png", kind, number, wait_ms)
        lines = {"name": name, "backend": "folder", "path": name, "loop": True, "trigger": "software", **settings}
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        return f"[[cameras]]\n{table}[cameras.guard]\nenabled = false\n"  # orders are written in dark colours

    def start(self, *options: str, limit_s: float = 60.0) -> Self:
        """Start the agent and wait until it takes triggers."""
        environment = os.environ | {
            "SCRIPT_LEDGER": str(self.ledger),
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        engine = "worker.engine=scripted_engine:ScriptedEngine"
        command = [*CLI, "run", "--config", str(self.config), "--set", engine, *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environment)
        self.wait_for(lambda: self.status().get("state") not in (None, "starting"), limit_s)
        return self

    def ask(self, cmd: str, **request: Any) -> dict[str, Any]:
        """One command; ValueError for a refusal."""
        return ask(self.control, {"cmd": cmd, "id": 1, **request}, timeout_s=30)

    def status(self) -> dict[str, Any]:
        """The agent's own, or {} while it does not answer."""
        try:
            return ask(self.control, {"cmd": "status", "id": 1}, timeout_s=1)
        except ConfigError:
            assert self.process is None or self.process.poll() is None, self.log.read_text()
            return {}

    def trigger(self, camera: str, *ids: str) -> None:
        """One trigger after the other, each accepted."""
        for trigger_id in ids:
            reply = self.ask("trigger", camera=camera, trigger_id=trigger_id, part_id=f"part of {trigger_id}")
            assert reply["trigger_id"] == trigger_id

    def receive(self, timeout_s: float = 0.0) -> bool:
        """Take one message off the subscriber; False where there is none."""
        if not self._sub.poll(int(timeout_s * 1000)):
            return False
        topic, header, *payload = self._sub.recv_multipart()
        unpacked = msgpack.unpackb(header) | {"t_received": time.monotonic()}
        self.messages.append((topic.decode(), unpacked, payload[0] if payload else None))
        return True

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The headers received so far under `verdict/`, `late/`, `mask/` or `status/`."""
        return [header for topic, header, _ in self.messages if topic.startswith(kind + "/")]

    def until(self, kind: str, count: int, limit_s: float = 30.0) -> list[dict[str, Any]]:
        """The headers of a kind, once there are so many."""
        end = time.monotonic() + limit_s
        while len(self.of(kind)) < count:
            assert time.monotonic() < end, (self.of(kind), self.log.read_text())
            self.receive(0.1)
        return self.of(kind)

    def wait_for(self, true: Callable[[], Any], limit_s: float = 60.0) -> None:
        """Until it is true; messages are received meanwhile."""
        end = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < end, self.log.read_text()
            self.receive(0.05)

    def stop(self) -> None:
        """SIGTERM, and all that comes out by it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        while self.receive(0.2):
            pass
        assert code == 0, self.log.read_text()
        self.process = None

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)
        self.process = None

    def close(self) -> None:
        """Whatever still runs ends."""
        if self.process is not None:
            self.kill()
        self._context.destroy(linger=0)


Make = Callable[..., Station]
"""What the fixture `make_station` gives."""
