"""`flawline bench`: stage times of an inspection beside a plain reference of the same models, in the same run."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from flawline.config.errors import BundleError
from flawline.config.recipe import PromptSettings, Recipe
from flawline.models.bench_reference import Picture, PlainPipeline, Timing
from flawline.models.bundle import Bundle
from flawline.models.inspector import Inspector
from flawline.models.switches import PLAIN, Switches
from flawline.models.towers import Towers, load_towers

SUSPICIOUS_SHARE = 0.02  # of the map's pixels, which the suspicious frame has in S_a
DAY_SHARE = 0.01  # of a day's frames that are suspicious
CAMERAS = 8
WARM_UP = 3
PACKAGES = ("torch", "torchvision", "open_clip_torch", "segment-anything", "timm", "numpy", "flawline")

Source = Callable[[str, Switches], Towers]
"""Loads the models that are measured, at a precision, with switches."""


def from_bundle(bundle: str | os.PathLike[str] | Bundle, device: str) -> Source:
    """The models of a bundle on the disk."""
    return lambda precision, switches: load_towers(bundle, device, precision, switches)


def bench(
    source: Source,
    precision: str = "auto",
    picture: Picture | None = None,
    runs: int = 20,
    switches: Switches | None = None,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Over `runs` rounds a clean frame, a suspicious one and the reference take turns; then batches of 8 cameras.

    What makes a frame clean or suspicious is the threshold of S_a, set by this picture's own map, so the times hold for
    any picture of its size. On CUDA the reference is measured under bf16 autocast too. Raises BundleError and
    ConfigError as `Inspector.load` does.
    """
    picture = texture(960, 1280) if picture is None else picture
    switches = Switches.from_environment() if switches is None else switches
    inspector = Inspector(source(precision, switches))
    towers = inspector.towers
    references = _references(source, towers)
    clip_map = inspector.trace(picture, _cut_at(1.0)).clip_map
    recipes = {"clean": _cut_at(1.0), "suspicious": _cut_at(float(np.quantile(clip_map, 1.0 - SUSPICIOUS_SHARE)))}
    trace = inspector.trace(picture, recipes["suspicious"])
    if inspector.inspect(picture, recipes["clean"]).refined:
        raise BundleError(f"bundle {towers.bundle.name!r}: its map reaches 1.0 on this picture; give another picture")
    times: dict[str, list[Timing]] = {name: [] for name in (*recipes, *references)}
    for number in range(WARM_UP + runs):
        for name, recipe in recipes.items():
            times[name].append(_inspect(inspector, picture, recipe))
        for name, plain in references.items():
            times[name].append(plain(picture, trace.points, trace.labels))
        if number >= WARM_UP:
            on_round()
    counted = {name: rounds[WARM_UP:] for name, rounds in times.items()}
    clean, suspicious, reference = (_medians(counted[name]) for name in ("clean", "suspicious", "reference"))
    result = {
        "machine": machine(towers.device),
        "versions": versions(),
        "switches": switches.as_dict(),
        "bundle": towers.bundle.name,
        "precision": str(towers.dtype).removeprefix("torch."),
        "picture": list(picture.shape[:2]),
        "points": {"positive": int((trace.labels == 1).sum()), "negative": int((trace.labels == 0).sum())},
        "runs": runs,
        "flawline_ms": suspicious.stages | {"clean": clean.whole, "suspicious": suspicious.whole},
        "p99_ms": {name: _p99(counted[name]) for name in recipes},
        "ppg_cps_ms": round(suspicious.stages["prompt"] + suspicious.stages["cascade"], 3),
        "reference_ms": reference.whole,
        "reference_stage_ms": reference.stages,
        "ratio": round(reference.whole / suspicious.whole, 3),
        "frames_per_second": _frames_per_second(inspector, picture, counted, max(1, runs // CAMERAS)),
    }
    if "autocast" in counted:
        autocast = _medians(counted["autocast"]).whole
        result |= {"reference_bf16_ms": autocast, "ratio_bf16": round(autocast / suspicious.whole, 3)}
    return result


def _references(source: Source, towers: Towers) -> dict[str, PlainPipeline]:
    """In float32 with the libraries' own attention; and in bf16 where there is a device for it."""
    same = towers.switches.attention == PLAIN.attention and towers.switches.batchnorm == PLAIN.batchnorm
    own = towers.dtype == torch.float32 and same
    plain = towers if own else source("fp32", PLAIN)
    references = {"reference": PlainPipeline(plain)}
    if towers.device.type == "cuda":
        references["autocast"] = PlainPipeline(plain, torch.bfloat16)
    return references


def _frames_per_second(
    inspector: Inspector, picture: Picture, times: dict[str, list[Timing]], rounds: int
) -> dict[str, float]:
    """Of one camera's frames one by one, of a day's mix of them (by their mean times), of 8 cameras' together."""
    mean = {name: statistics.fmean(timing.whole for timing in times[name]) for name in ("clean", "suspicious")}
    day = (1.0 - DAY_SHARE) * mean["clean"] + DAY_SHARE * mean["suspicious"]
    figures = {name: 1000.0 / ms for name, ms in (mean | {"day": day}).items()}
    warm_up = WARM_UP if inspector.towers.device.type == "cuda" else 1
    pictures = [np.ascontiguousarray(np.roll(picture, 37 * camera, axis=1)) for camera in range(CAMERAS)]
    with _all_at_once(inspector):
        tops = [inspector.trace(one, _cut_at(1.0)).clip_map for one in pictures]
        cuts = {"clean": 1.0, "suspicious": min(float(np.quantile(top, 1.0 - SUSPICIOUS_SHARE)) for top in tops)}
        for name, cut in cuts.items():
            recipe, laps = _cut_at(cut), []
            for number in range(warm_up + rounds):
                started = time.perf_counter()
                results = inspector.inspect_batch(pictures, recipe)
                if number >= warm_up:
                    laps.append(time.perf_counter() - started)
            assert all(result.refined == (name == "suspicious") for result in results)
            figures[f"batch_{name}"] = CAMERAS / statistics.median(laps)
    return {name: round(value, 2) for name, value in figures.items()}


@contextmanager
def _all_at_once(inspector: Inspector) -> Any:
    """On a GPU the pictures of all cameras go through the encoders together; a CPU gains nothing by it."""
    before = inspector.tile_batch
    if inspector.towers.device.type == "cuda":
        inspector.tile_batch = CAMERAS
    try:
        yield
    finally:
        inspector.tile_batch = before


def texture(height: int, width: int, seed: int = 0) -> Picture:
    """A picture (height, width, 3) of soft random spots."""
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = named[0] if named else model
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "torch": torch.__version__,
    }


def versions() -> dict[str, str | None]:
    """Of Python, of what computes, and of CUDA and cuDNN as torch was built with them."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None  # type: ignore[no-untyped-call]
    found["cudnn"] = None if cudnn is None else str(cudnn)
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _cut_at(threshold: float) -> Recipe:
    return Recipe(prompt=PromptSettings(region_threshold=min(max(threshold, 0.0), 1.0)))


def _inspect(inspector: Inspector, picture: Picture, recipe: Recipe) -> Timing:
    started = time.perf_counter()
    result = inspector.inspect(picture, recipe)  # its maps are on the host, so all work is done
    return Timing((time.perf_counter() - started) * 1000.0, result.stage_ms)


def _medians(rounds: Sequence[Timing]) -> Timing:
    stages = {name: round(statistics.median(timing.stages[name] for timing in rounds), 3) for name in rounds[0].stages}
    return Timing(round(statistics.median(timing.whole for timing in rounds), 3), stages)


def _p99(rounds: Sequence[Timing]) -> float:
    """The 99th percentile of the whole; of less than a hundred rounds, next to the slowest of them."""
    return round(float(np.percentile([timing.whole for timing in rounds], 99)), 3)
