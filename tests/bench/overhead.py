"""What the agent itself costs: from grab to publish without inference, verdicts a second, and how deadlines are kept.

    python tests/bench/overhead.py [--frames 500] [--no-preview] [--json]

The no-op engine finds the same square in every picture; the journal is on and every verdict carries its mask.
Times are a subscriber's: its own clock on the same machine, against the frame's `t_grab`.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))
from station import Station

NOOP = ("--set", "worker.engine=flawline.models.noop:NoopEngine", "--set", "publish.masks=always")


def quantiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {f"p{q:g}": round(float(np.percentile(values, q)), 3) for q in (50, 90, 99, 99.9)} | {
        "max": round(max(values), 3)
    }


def line_of(folder: Path, width: int, height: int, fps: float | None) -> Station:
    """A free-running camera that replays four pictures."""
    pace = {} if fps is None else {"fps": fps}
    station = Station(folder, {"top": []}, trigger="free", **pace)
    rng = np.random.default_rng(1)
    for number in range(4):
        picture = rng.integers(0, 255, (height, width, 3), np.uint8)
        cv2.imwrite(str(folder / "top" / f"{number}.bmp"), picture)  # is read fastest
    return station


def grab_to_publish(
    folder: Path, width: int, height: int, fps: float, frames: int, more: tuple[str, ...]
) -> dict[str, Any]:
    """Milliseconds from the frame's arrival to its verdict: at the subscriber, and by the header's own times."""
    station = line_of(folder, width, height, fps)
    seen: list[float] = []
    own: list[float] = []
    parts: dict[str, list[float]] = {"to_worker": [], "worker": [], "to_journal": []}
    station.start(*NOOP, *more)
    while len(seen) < frames + 20:
        station.messages.clear()
        if station.receive(1.0) and station.messages[0][0].startswith("verdict/"):
            header = station.messages[0][1]
            seen.append((time.time_ns() - header["t_grab"]) / 1e6)
            own.append((header["t_publish"] - header["t_grab"]) / 1e6)
            times = [header[key] for key in ("t_grab", "t_start", "t_done", "t_publish")]
            for values, (begin, end) in zip(parts.values(), itertools.pairwise(times), strict=True):
                values.append((end - begin) / 1e6)
    station.stop()
    station.close()
    return {
        "size": [width, height],
        "fps": fps,
        "at_subscriber_ms": quantiles(seen[20:]),
        "header_ms": quantiles(own[20:]),
        "median_ms": {part: round(float(np.median(values[20:])), 3) for part, values in parts.items()},
    }


def verdicts_a_second(folder: Path, width: int, height: int, frames: int) -> dict[str, Any]:
    """As fast as the folder is read; no frame may be dropped."""
    station = line_of(folder, width, height, None)
    station.start(*NOOP)
    times: list[float] = []
    masks = errors = 0
    while len(times) < frames + 100:
        station.messages.clear()
        if station.receive(1.0):
            topic, header, _ = station.messages[0]
            masks += topic.startswith("mask/")
            if topic.startswith("verdict/"):
                times.append(header["t_received"])
                errors += header["result"] == "error"
    station.stop()
    station.close()
    rate = (len(times) - 100) / (times[-1] - times[99])
    return {"size": [width, height], "verdicts_per_second": round(rate, 1), "errors": errors, "masks": masks}


def deadlines(folder: Path, triggers: int, deadline_ms: int = 50) -> dict[str, Any]:
    """Every inspection takes longer than the deadline: how much later than it does `error: deadline` leave?"""
    orders = [("good", deadline_ms + 20)]
    station = Station(folder, {"top": orders}, f"[recipes.default]\ndeadline_ms = {deadline_ms}\n").start()
    published: list[float] = []
    received: list[float] = []
    for number in range(triggers):
        station.messages.clear()
        station.ask("trigger", camera="top", trigger_id=str(number))
        (verdict,) = station.until("verdict", 1)
        assert verdict["reason"] == "deadline", verdict
        due = verdict["mono_trigger"] / 1e6 + deadline_ms
        published.append(verdict["mono_publish"] / 1e6 - due)
        received.append(verdict["t_received"] * 1e3 - due)
        station.until("late", 1)
    worst = station.status()["deadlines"]
    station.stop()
    station.close()
    return {
        "deadline_ms": deadline_ms,
        "triggers": triggers,
        "overshoot_at_subscriber_ms": quantiles(received),
        "agents_own_worst_ms": worst["worst_overshoot_ms"],
    }


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--only", choices=["latency", "rate", "deadlines"])
    parser.add_argument("--no-preview", action="store_true", help="measure the latency of an agent without one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    more = ("--set", "preview.enabled=false") if options.no_preview else ()
    with tempfile.TemporaryDirectory() as name:
        folders = iter([Path(name) / part for part in "abc"])
        results: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
        }
        work = {
            "latency": lambda folder: grab_to_publish(folder, 1920, 1200, 10.0, options.frames, more),
            "rate": lambda folder: verdicts_a_second(folder, 640, 480, 4 * options.frames),
            "deadlines": lambda folder: deadlines(folder, options.frames),
        }
        for part, measure in work.items():
            folder = next(folders)
            folder.mkdir()
            if options.only in (None, part):
                results[part] = measure(folder)
                if not options.json:
                    print(part, json.dumps(results[part]), flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
