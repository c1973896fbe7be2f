"""A Ray cluster of our own on this machine: small, no dashboard, gone with the process that started it.

`ray.init()` alone would do where there is time. But it lets its helpers choose their ports, and its scheduler ends
itself when a helper, a Python program with many imports, has not written its port down within 15 s: on a small or busy
machine it never comes up. Ports that are fixed beforehand need not be waited for.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import flawline
from flawline.config.errors import ConfigError, FlawlineError

HOST = "127.0.0.2"
"""Loopback for what they say to each other. Ray puts the machine's outer address in the place of 127.0.0.1."""
START_LIMIT_S = 300.0
STORE_BYTES = 256 << 20
"""Shared memory for results under way: some maps per shard."""
_TOKEN = secrets.token_hex(32)
"""Ray's servers listen on every address, and whoever connects could run programs as this user: a token that only our
processes know keeps others out. One for the life of this process, because Ray reads it once."""
_PORTS = (
    "port",
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
_PROGRAM = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: ends, and its helpers with it, when its parent dies
from ray.scripts.scripts import main
main()
"""


class LocalHead:
    """Started by `start`; `close` ends it.

    Make the first one before Ray is imported, which then takes its token from the environment; `close` takes it out
    again. Raises ConfigError where that is too late.
    """

    _known_to_ray = False

    def __init__(self) -> None:
        if "ray" in sys.modules and not LocalHead._known_to_ray:
            raise ConfigError(
                "--engine ray: this process has imported Ray already: start a cluster by ray.init() first"
            )
        LocalHead._known_to_ray = True
        self._undo = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="flawline-ray-"))
        self._undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._log = self._folder / "head.log"
        self._set("RAY_AUTH_MODE", "token")
        self._set("RAY_AUTH_TOKEN", _TOKEN)

    def start(self, ray: Any, shards: int) -> Self:
        """Start it for so many shards and connect `ray`, the imported package. Raises FlawlineError."""
        root = str(Path(flawline.__file__).resolve().parent.parent)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_register_timeout_seconds": str(int(START_LIMIT_S)),
        }
        ports = _free_ports(len(_PORTS))
        command = [
            *(sys.executable, "-c", _PROGRAM, "start", "--head", "--block", f"--node-ip-address={HOST}"),
            *(f"--num-cpus={shards}", f"--object-store-memory={STORE_BYTES}", f"--temp-dir={self._folder}"),
            *("--include-dashboard=false", "--disable-usage-stats"),
            *(f"--{name}={port}" for name, port in zip(_PORTS, ports, strict=True)),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._undo.callback(self._stop)
        try:
            self._connect(ray, ports[0])
        except BaseException:
            self.close()
            raise
        return self

    def _set(self, name: str, value: str) -> None:
        before = os.environ.get(name)
        os.environ[name] = value
        if before is None:
            self._undo.callback(os.environ.pop, name, None)
        else:
            self._undo.callback(os.environ.__setitem__, name, before)

    def _connect(self, ray: Any, port: int) -> None:
        assert self._process is not None
        end = time.monotonic() + START_LIMIT_S
        why = "it does not listen"
        while time.monotonic() < end:
            if self._process.poll() is not None:
                said = self._log.read_text(errors="replace").strip().splitlines()
                raise FlawlineError(f"--engine ray: Ray ended at its start: {said[-1] if said else 'without a word'}")
            if _listens(port):
                try:
                    ray.init(address=f"{HOST}:{port}", log_to_driver=False, logging_level="ERROR")
                except (ConnectionError, RuntimeError) as error:  # its scheduler is not there yet
                    why = str(error)
                else:
                    return
            time.sleep(0.5)
        raise FlawlineError(f"--engine ray: Ray did not start within {START_LIMIT_S:g} s: {why}")

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it, after `ray.shutdown()`. Twice does no harm."""
        self._undo.close()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0
