"""Stage times of an inspection beside a plain reference of the same models, measured in the same run.

The reference is what a reader of the two libraries' documentation would write: open_clip's forward of the
picture, `SamPredictor.set_image`, and three `predict`s, each fed by the one before. It gets its points for
nothing and makes no map, no fusion and no decision, so the ratio is rather too small than too large.
"""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything import SamPredictor

from flawline.config.errors import BundleError
from flawline.config.recipe import PromptSettings, Recipe
from flawline.models.inspector import Inspector
from flawline.models.towers import Towers, load_towers

Picture = NDArray[np.uint8]
SUSPICIOUS_SHARE = 0.02  # of the map's pixels, which the suspicious frame has in S_a
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the whole, and its stages."""

    whole: float
    stages: dict[str, float]


class PlainPipeline:
    """The reference, in float32 and one picture at a time."""

    def __init__(self, towers: Towers) -> None:
        self._clip = towers.clip
        self._device = towers.device
        self._predictor = SamPredictor(towers.sam)

    @torch.no_grad()
    def __call__(self, picture: Picture, points: NDArray[np.float32], labels: NDArray[np.int64]) -> Timing:
        """One picture, (H, W, 3) uint8 RGB; points (n, 2) x, y and labels (n,) as `SamPredictor` takes them."""
        clock = [time.perf_counter()]
        size = self._clip.input_size
        squashed = np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))
        tensor = torch.from_numpy(squashed).permute(2, 0, 1).unsqueeze(0).to(self._device)
        self._clip.model.encode_image(self._clip.normalise(tensor)).cpu()
        clock.append(time.perf_counter())
        self._predictor.set_image(picture)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        clock.append(time.perf_counter())
        extra: dict[str, NDArray[np.float32]] = {}
        for level in range(3):
            masks, scores, logits = self._predictor.predict(points, labels, multimask_output=True, **extra)
            best = int(scores.argmax())
            extra = {"mask_input": logits[best : best + 1]}
            y, x = np.nonzero(masks[best])
            if level == 1 and len(x):
                extra["box"] = np.array([x.min(), y.min(), x.max(), y.max()], np.float32)
        clock.append(time.perf_counter())
        laps = [(after - before) * 1000.0 for before, after in itertools.pairwise(clock)]
        return Timing(sum(laps), dict(zip(("clip", "encode", "cascade"), laps, strict=True)))


def bench(
    bundle: str | os.PathLike[str],
    device: str = "auto",
    precision: str = "auto",
    picture: Picture | None = None,
    runs: int = 20,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Medians over `runs` rounds of: a clean frame, a suspicious one, the reference; they take turns.

    What makes a frame clean or suspicious is the threshold of S_a, set by this picture's own map, so the
    times hold for any picture of its size. Raises BundleError and ConfigError as `Inspector.load` does.
    """
    picture = texture(960, 1280) if picture is None else picture
    inspector = Inspector.load(bundle, device, precision)
    towers = inspector.towers
    plain = PlainPipeline(towers if towers.dtype == torch.float32 else load_towers(bundle, device, "fp32"))
    clip_map = inspector.trace(picture, _cut_at(1.0)).clip_map
    recipes = {"clean": _cut_at(1.0), "suspicious": _cut_at(float(np.quantile(clip_map, 1.0 - SUSPICIOUS_SHARE)))}
    trace = inspector.trace(picture, recipes["suspicious"])
    if inspector.inspect(picture, recipes["clean"]).refined:
        raise BundleError(f"bundle {towers.bundle.name!r}: its map reaches 1.0 on this picture; give another picture")
    times: dict[str, list[Timing]] = {"clean": [], "suspicious": [], "reference": []}
    for number in range(WARM_UP + runs):
        for name, recipe in recipes.items():
            times[name].append(_inspect(inspector, picture, recipe))
        times["reference"].append(plain(picture, trace.points, trace.labels))
        if number >= WARM_UP:
            on_round()
    counted = {name: rounds[WARM_UP:] for name, rounds in times.items()}
    clean, suspicious, reference = (_medians(counted[name]) for name in ("clean", "suspicious", "reference"))
    return {
        "machine": machine(towers.device),
        "bundle": towers.bundle.name,
        "precision": str(towers.dtype).removeprefix("torch."),
        "picture": list(picture.shape[:2]),
        "runs": runs,
        "flawline_ms": suspicious.stages | {"clean": clean.whole, "suspicious": suspicious.whole},
        "reference_ms": reference.whole,
        "reference_stage_ms": reference.stages,
        "ratio": round(reference.whole / suspicious.whole, 3),
    }


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


def _cut_at(threshold: float) -> Recipe:
    return Recipe(prompt=PromptSettings(region_threshold=min(max(threshold, 0.0), 1.0)))


def _inspect(inspector: Inspector, picture: Picture, recipe: Recipe) -> Timing:
    started = time.perf_counter()
    result = inspector.inspect(picture, recipe)  # its maps are on the host, so all work is done
    return Timing((time.perf_counter() - started) * 1000.0, result.stage_ms)


def _medians(rounds: list[Timing]) -> Timing:
    stages = {name: round(statistics.median(timing.stages[name] for timing in rounds), 3) for name in rounds[0].stages}
    return Timing(round(statistics.median(timing.whole for timing in rounds), 3), stages)
