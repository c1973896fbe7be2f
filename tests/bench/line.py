"""The embedded bundle end to end: verdicts a second with one suspicious picture in ten, and what each kind costs.

    python tests/bench/line.py [--frames 300] [--share 0.1] [--threads 2]

Drawn parts of 1280 x 960 px lie in a folder that the agent replays as fast as it judges. Which of them are suspicious
(SAM runs) is what the bundle itself said of them before. Times are those of the verdicts.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flawline.camera.synthetic import choose_product, draw_part
from flawline.models.inspector import Inspector
from flawline.models.results import STAGES

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))
from station import Station

SIZE = (960, 1280)
PICTURES = 20


def draw_pictures(folder: Path, share: float) -> None:
    """PICTURES files, `share` of them suspicious to the bundle, evenly among the others."""
    folder.mkdir()
    inspector = Inspector.load("demo", device="cpu")
    wanted = {True: round(PICTURES * share), False: PICTURES - round(PICTURES * share)}
    found: dict[bool, list[Any]] = {True: [], False: []}
    seed = 0
    while any(len(found[kind]) < wanted[kind] for kind in found):
        rng = np.random.default_rng(seed)
        part = draw_part(rng, choose_product(rng), *SIZE, defects=seed % 2)
        suspicious = inspector.inspect(part.image).stage_ms["cascade"] > 0
        if len(found[suspicious]) < wanted[suspicious]:
            found[suspicious].append(part.image)
        seed += 1
    every = max(1, PICTURES // max(1, wanted[True]))
    for number in range(PICTURES):
        kind = bool(found[True]) and number % every == 0
        cv2.imwrite(str(folder / f"{number:03}.png"), cv2.cvtColor(found[kind].pop(), cv2.COLOR_RGB2BGR))


def measure(folder: Path, frames: int, threads: int) -> dict[str, Any]:
    """Replay, and read the verdicts."""
    station = Station(folder, {"top": []}, "[recipes.default]\ndeadline_ms = 5000\n", trigger="free")
    engine = "worker.engine=flawline.models.collaboration:CollaborationEngine"
    station.start("--set", engine, "--set", f"model.threads={threads}", limit_s=180)
    verdicts = station.until("verdict", frames + 10, limit_s=frames * 2.0 + 60)[10:]
    station.stop()
    station.close()
    suspicious = [verdict["stage_ms"]["cascade"] > 0 for verdict in verdicts]
    seconds = (verdicts[-1]["t_publish"] - verdicts[0]["t_publish"]) / 1e9
    report: dict[str, Any] = {
        "load": round(os.getloadavg()[0], 1),
        "threads": threads,
        "verdicts_per_second": round((len(verdicts) - 1) / seconds, 1),
        "errors": sum(verdict["result"] == "error" for verdict in verdicts),
        "suspicious_share": round(float(np.mean(suspicious)), 3),
    }
    for name, kind in (("clean", False), ("suspicious", True)):
        chosen = [verdict for verdict, mark in zip(verdicts, suspicious, strict=True) if mark == kind]
        if chosen:
            stages = {stage: round(float(np.median([v["stage_ms"][stage] for v in chosen])), 1) for stage in STAGES}
            busy = [(v["t_done"] - v["t_start"]) / 1e6 for v in chosen]
            report[name] = {
                "worker_ms": {f"p{q}": round(float(np.percentile(busy, q)), 1) for q in (50, 95)},
                "stage_ms": stages,
            }
    return report


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        draw_pictures(Path(name) / "top", options.share)
        print(json.dumps(measure(Path(name), options.frames, options.threads), indent=2))


if __name__ == "__main__":
    main()
