"""Runs the real agent for minutes and shows whether memory, handles and threads stay flat.

    python tests/soak.py --minutes 10            no-op engine: what the agent itself costs
    python tests/soak.py --minutes 10 --bundle demo
    python tests/soak.py --minutes 10 --camera simulated    parts drawn in the agent: its memory breathes with each part

Verdicts are made at a rate, and meanwhile what happens on a line: subscribers come and go, recipes are switched, the
configuration is reloaded, status and metrics are asked for. Exit code 1 where something has grown by more than 2 %.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import zmq

from flawline.agent.control import ask
from flawline.camera.simulated import SimulatedCamera
from flawline.config.settings_camera import CameraSettings

MOST_GROWTH = 0.02
WARM_UP_S = 30.0
WARM_UP_VERDICTS = 300  # then what is bounded is full: the page's history of 240, the failed parts, SQLite's pages
RING_MB = 24 * 6 * 640 * 480 / 1e6  # a slot's pages come into being at its first use, which a busy moment may bring
CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def of_process(pid: int) -> dict[str, float]:
    """What /proc tells: MB for memory, else numbers."""
    status = Path(f"/proc/{pid}/status").read_text()

    def mb(key: str) -> float:
        found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
        return int(found.group(1)) / 1024 if found else 0.0

    threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
    return {
        "resident_mb": mb("RssAnon") + mb("RssFile"),
        "of_that_heap_mb": mb("RssAnon"),
        "shared_memory_mb": mb("RssShmem"),
        "file_descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(threads.group(1)) if threads else 0,
    }


def sample(agent: int, status: dict[str, Any]) -> dict[str, float]:
    worker = status["worker"]
    return {
        **{f"agent.{key}": value for key, value in of_process(agent).items()},
        **{f"worker.{key}": value for key, value in of_process(worker["pid"]).items()},
        "worker.gpu_mb": (worker.get("gpu_memory_bytes") or 0) / 1e6,
    }


def median_of(samples: list[dict[str, float]]) -> dict[str, float]:
    return {key: sorted(one[key] for one in samples)[len(samples) // 2] for key in samples[0]}


def write_pictures(folder: Path, count: int = 12) -> None:
    """Parts of the simulated line as files: drawn in the agent, the painter's memory would hide the agent's own."""
    camera = SimulatedCamera(CameraSettings(name="top"))
    folder.mkdir()
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:02}.png"), cv2.cvtColor(camera.part(number).image, cv2.COLOR_RGB2BGR))


def write_config(folder: Path, fps: float, ports: dict[str, int], threshold: float, masks: str) -> None:
    """With the folder of pictures where there is one, else with the simulated line."""
    camera = 'backend = "simulated"'
    if (folder / "pictures").exists():
        camera = 'backend = "folder"\npath = "pictures"\nloop = true'
    text = f"""
[[cameras]]
name = "top"
{camera}
fps = {fps}
[recipes.default]
threshold = {threshold}
[recipes.other]
threshold = 0.6
[publish]
endpoint = "tcp://127.0.0.1:{ports["publish"]}"
masks = "{masks}"
[control]
endpoint = "tcp://127.0.0.1:{ports["control"]}"
[preview]
port = {ports["preview"]}
[journal]
path = "state"
archive_mb = 20
"""
    (folder / "line.toml").write_text(text)


def stir(number: int, agent: subprocess.Popen[bytes], folder: Path, fps: float, ports: dict[str, int]) -> int:
    """One round of what happens on a line; returns how many verdicts a new subscriber heard meanwhile."""
    control = f"tcp://127.0.0.1:{ports['control']}"
    heard = 0
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"verdict/")
        subscriber.connect(f"tcp://127.0.0.1:{ports['publish']}")
        ask(control, {"cmd": "recipe.activate", "id": 1, "recipe": "other" if number % 2 else "default"}, timeout_s=60)
        write_config(folder, fps, ports, 0.5 + 0.1 * (number % 3), "always" if number % 2 else "fail")
        agent.send_signal(signal.SIGHUP)
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['preview']}/metrics", timeout=60) as metrics:
            metrics.read()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            if subscriber.poll(500):
                subscriber.recv_multipart()
                heard += 1
    return heard


def soak(minutes: float, bundle: str | None, fps: float, camera: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="flawline-soak-") as name:
        folder = Path(name)
        if camera == "folder":
            write_pictures(folder / "pictures")
        ports = {key: free_port() for key in ("publish", "control", "preview")}
        write_config(folder, fps, ports, 0.5, "fail")
        engine = [] if bundle else ["--set", "worker.engine=flawline.models.noop:NoopEngine"]
        more = ["--set", f"model.bundle={bundle}"] if bundle else []
        with (folder / "log").open("wb") as log:
            agent = subprocess.Popen([*CLI, "run", "--config", str(folder / "line.toml"), *engine, *more], stderr=log)
        control = f"tcp://127.0.0.1:{ports['control']}"
        try:
            status = wait_until_running(agent, control, folder / "log")
            samples: list[tuple[float, dict[str, float]]] = []
            number = heard = 0
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < minutes * 60:
                heard += stir(number, agent, folder, fps, ports)
                number += 1
                status = ask(control, {"cmd": "status", "id": 1}, timeout_s=60)
                warm = elapsed >= min(WARM_UP_S, minutes * 60 / 3) and status["verdicts"] >= WARM_UP_VERDICTS
                if warm or elapsed >= minutes * 60 / 2:
                    samples.append((elapsed, sample(agent.pid, status)))
            agent.send_signal(signal.SIGTERM)
            code = agent.wait(120)
        finally:
            agent.kill()
            agent.wait()
        reloads = (folder / "log").read_text().count('"event": "reloaded"')
    edge = max(1, len(samples) // 5)
    first, last = median_of([one for _, one in samples[:edge]]), median_of([one for _, one in samples[-edge:]])
    return {
        "minutes": minutes,
        "engine": bundle or "no-op",
        "camera": camera,
        "exit_code": code,
        "verdicts": status["verdicts"],
        "verdicts_heard": heard,
        "subscribers": number,
        "reloads_logged": reloads,
        "owed": status["counters"]["owed"],
        "start": first,
        "end": last,
        "every_minute": [one for at, one in thin(samples)],
        "grown": sorted(key for key in first if grows(key, first[key], last[key])),
    }


def thin(samples: list[tuple[float, dict[str, float]]]) -> list[tuple[float, dict[str, float]]]:
    """About one sample a minute."""
    kept: list[tuple[float, dict[str, float]]] = []
    for at, one in samples:
        if not kept or at - kept[-1][0] >= 60:
            kept.append((at, one))
    return kept


def grows(key: str, first: float, last: float) -> bool:
    """More than 2 %; of handles and threads not one may stay; the ring only may come to its full size."""
    if key.endswith("shared_memory_mb"):
        return last > max(RING_MB, first)
    limit = 0.0 if key.endswith(("file_descriptors", "threads")) else max(first * MOST_GROWTH, 1.0)
    return last - first > limit


def wait_until_running(agent: subprocess.Popen[bytes], control: str, log: Path) -> dict[str, Any]:
    end = time.monotonic() + 400
    while time.monotonic() < end:
        if agent.poll() is not None:
            raise SystemExit(log.read_text())
        try:
            status = ask(control, {"cmd": "status", "id": 1}, timeout_s=2)
        except Exception:
            continue
        if status["state"] == "running":
            return status
        time.sleep(0.5)
    raise SystemExit(log.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--bundle", help="a model bundle instead of the no-op engine")
    parser.add_argument("--fps", type=float, default=10.0)
    parser.add_argument("--camera", choices=("folder", "simulated"), default="folder")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = soak(arguments.minutes, arguments.bundle, arguments.fps, arguments.camera)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        for key in ("engine", "camera", "minutes", "verdicts", "subscribers", "reloads_logged", "owed", "exit_code"):
            print(f"{key:28} {report[key]}")
        print(f"{'':28} {'start':>10} {'end':>10} {'growth':>8}")
        for key, first in report["start"].items():
            if key == "agent.resident_mb":
                print(f"{key}, each minute: {' '.join(f'{one[key]:.0f}' for one in report['every_minute'])}")
            last = report["end"][key]
            growth = f"{(last - first) / first:+.1%}" if first else ""
            print(f"{key:28} {first:10.1f} {last:10.1f} {growth:>8}{'  GROWS' if key in report['grown'] else ''}")
    return 1 if report["grown"] or report["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
