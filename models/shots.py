"""How much a few good parts help: the map by words alone, by the memory of so many good parts alone, and by both.

Pictures are brought to one square size first, because some sets hold several. For every number of good parts and every
draw, that many pictures of `train/good` are learnt as `flawline learn` does it, and all test pictures are judged.
The maps are CLIP's, before SAM; the image score is the map's maximum. Intervals are over pictures and draws.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.bootstrap import Tallies, Tally, bin_edges, image_tallies, interval, resampled
from flawline.models.datasets import Category
from flawline.models.evaluate import Progress, stamps
from flawline.models.ground_truth import read_rgb, truth
from flawline.models.inspector import Inspector
from flawline.models.memory import Memory
from flawline.models.memory_learn import Described, Learner
from flawline.models.metrics import Mask, Reals, rank_metrics
from flawline.models.tiles import Tile

EDGE = 256  # px, of the maps that are measured
FRAMES_TIMED = 20
MAPS = ("words", "memory", "both")
SHOT_METRICS = ("pixel_auroc", "image_auroc")


@dataclass(frozen=True)
class Known:
    """The pictures of a class, each encoded once."""

    learner: Learner
    good: list[Described]
    cells: list[Tensor]  # of every test picture, (D, h, w) float16 on the CPU
    words: list[Tensor]  # (S, S) on the CPU, the map by words
    tiles: list[Tile]
    defective: Mask  # (n,)
    with_pixels: list[int]  # numbers of the test pictures that `masks` belongs to
    masks: list[Mask]  # (EDGE, EDGE)


@dataclass(frozen=True)
class Measured:
    """One map's AUROC over all pixels and over the pictures, and what a resample of the pictures makes of them."""

    exact: dict[str, float | None]  # by SHOT_METRICS
    tallies: dict[str, Tallies]

    def resampled(self, seed: int) -> dict[str, Reals]:
        """By metric, of every resample; one seed draws the same pictures for every map of a class."""
        found = {}
        for metric, tallies in self.tallies.items():
            each = resampled(tallies, {"auroc": self.exact[metric]}, seed=seed)
            if "auroc" in each:
                found[metric] = each["auroc"]
        return found


class ShotStudy:
    """Measures classes for some numbers of good parts, `draws` times each. `recipes`: by class.

    Raises ConfigError for a recipe that does not judge whole frames.
    """

    def __init__(
        self,
        inspector: Inspector,
        recipes: Mapping[str, Recipe],
        shots: Sequence[int],
        draws: int,
        seed: int,
        progress: Progress,
        work: Path,
        identity: str,
    ) -> None:
        """`work`: the folder that keeps finished classes; `identity`: of the models and their arithmetic."""
        for recipe in recipes.values():
            if recipe.roi is not None or recipe.ignore or recipe.tiling.enabled or recipe.memory is not None:
                raise ConfigError("--shots: judges whole frames: use a recipe without roi, ignore, tiling and memory")
        self._inspector = inspector
        self._recipes = recipes
        self._shots = shots
        self._draws = draws
        self._seed = seed
        self._progress = progress
        self._work = work
        self._identity = identity

    def run(self, categories: Sequence[Category]) -> dict[str, Any]:
        """The entry `shots` of results.json."""
        able = [category for category in categories if category.train_good]
        done = {one.name: self._finished(one) for one in able}
        pictures = {one.name: len(one.test) + len(one.train_good) for one in able}
        already = sum(count for name, count in pictures.items() if done[name] is not None)
        self._progress.start(sum(pictures.values()), already)
        for category in categories:
            if category not in able:
                self._progress.say(f"{category.name}: has no good pictures to learn from (train/good)")
        return {
            "shots": list(self._shots),
            "draws": self._draws,
            "edge": EDGE,
            "sets": {one.name: done[one.name] or self._studied(one) for one in able},
            "without_good": [category.name for category in categories if category not in able],
        }

    def _studied(self, category: Category) -> dict[str, Any]:
        entry = self._study(category, self._recipes[category.name])
        self._work.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"signature": self._signature(category), "entry": entry})
        self._file(category).write_text(content, encoding="utf-8")
        return entry

    def _file(self, category: Category) -> Path:
        return self._work / f"{category.name}.shots.json"

    def _finished(self, category: Category) -> dict[str, Any] | None:
        """What an interrupted run has found of this class."""
        try:
            stored = json.loads(self._file(category).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = stored.get("signature") == self._signature(category)
        entry: dict[str, Any] | None = stored["entry"] if same else None
        return entry

    def _signature(self, category: Category) -> str:
        """Changes with everything that the numbers of a class depend on."""
        recipe = self._recipes[category.name].model_dump(mode="json")
        files = stamps(category, category.train_good)
        known = [self._identity, recipe, self._shots, self._draws, self._seed, files]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def _study(self, category: Category, recipe: Recipe) -> dict[str, Any]:
        known = self._encode(category, recipe)
        words = measure(known, [one[None] for one in known.words])
        available, lines = len(known.good), []
        wanted = sorted({min(number, available) for number in self._shots})
        if wanted and max(self._shots) > available:
            self._progress.say(f"{category.name}: has {available} good pictures")
        memory: Memory | None = None
        for number in wanted:
            seeds = [self._seed + draw for draw in range(self._draws if 0 < number < available else 1)]
            runs = []
            for seed in seeds:
                measured = {"words": words}
                if number:
                    memory = self._learnt(known, number, seed)
                    measured |= self._with_memory(known, memory, recipe)
                runs.append((seed, measured, memory if number else None))
            lines.append(_line(number, runs))
            self._progress.say(f"{category.name}: {number} good parts")
        spent = None if memory is None else self._cost(recipe, memory, category.test[0].image)
        return {"good_pictures": available, "lines": lines, "cost": spent}

    def _encode(self, category: Category, recipe: Recipe) -> Known:
        inspector = self._inspector
        learner, edge = Learner(inspector, category.name, recipe), inspector.towers.clip.input_size
        good = []
        for path in category.train_good:
            good.append(learner.describe(_square(path, edge), path.name))
            self._progress.step(category.name)
        cells, words, masks = [], [], {}
        for number, sample in enumerate(category.test):
            picture = _square(sample.image, edge)
            encoded = inspector.encode([picture], recipe)
            described = learner.describe_encoded(encoded, picture, sample.image.name)
            cells.append(described.cells[0])
            words.append(inspector.zero_shot(encoded, recipe)[0].cpu())
            mask = truth(sample, (EDGE, EDGE), (EDGE, EDGE))
            if mask is not None and category.with_masks:
                masks[number] = mask
            self._progress.step(category.name)
        defective = np.array([sample.defective for sample in category.test], bool)
        return Known(learner, good, cells, words, described.tiles, defective, list(masks), list(masks.values()))

    def _learnt(self, known: Known, number: int, seed: int) -> Memory:
        learner = known.learner.emptied()
        for chosen in np.random.default_rng(seed).permutation(len(known.good))[:number]:
            learner.take(known.good[chosen])
        return learner.learn().memory

    @torch.inference_mode()
    def _with_memory(self, known: Known, memory: Memory, recipe: Recipe) -> dict[str, Measured]:
        device, start, share = memory.bank.device, self._inspector.prepare(recipe).memory_start, recipe.memory_share
        alone, both = [], []
        for cells, words in zip(known.cells, known.words, strict=True):
            distances = memory.distances(cells[None].to(device).float(), known.tiles)
            both.append(memory.fuse(words[None].to(device), distances, start, share).cpu())
            alone.append(distances.cpu())
        return {"memory": measure(known, alone), "both": measure(known, both)}

    @torch.inference_mode()
    def _cost(self, recipe: Recipe, memory: Memory, path: Path) -> dict[str, Any]:
        """Median milliseconds a frame (of CPU time on the CPU): CLIP's stage by words, and what the memory adds."""
        inspector = self._inspector
        picture = _square(path, inspector.towers.clip.input_size)
        clip, added = [], []
        for _ in range(FRAMES_TIMED + 1):
            began = _now(inspector)
            encoded = inspector.encode([picture], recipe)
            middle = _now(inspector)
            cells = memory.cells(inspector.levels(encoded))
            memory.fuse(inspector.zero_shot(encoded, recipe), memory.distances(cells, encoded.tiles), 0.5, 0.5)
            memory.strangeness(cells)
            added.append(_now(inspector) - middle)
            clip.append(middle - began)
        stage, more = (1000.0 * float(np.median(times[1:])) for times in (clip, added))  # the first warms up
        return {"clip_ms": stage, "memory_ms": more, "share": more / stage, "rows": len(memory.bank)}


def measure(known: Known, maps: Sequence[Tensor]) -> Measured:
    """Of one map, (1, h, w), for every test picture."""
    sized = [
        functional.interpolate(one[:, None], (EDGE, EDGE), mode="bilinear", align_corners=False)[0, 0].numpy()
        for one in maps
    ]
    scores = np.array([one.max() for one in sized])
    exact = {"image_auroc": rank_metrics(scores[known.defective], scores[~known.defective]).auroc, "pixel_auroc": None}
    tallies = {"image_auroc": image_tallies(scores.astype(np.float64), known.defective)}
    if known.masks:
        planes = np.stack([sized[number] for number in known.with_pixels])
        masks = np.stack(known.masks)
        positive, negative = np.sort(planes[masks]), np.sort(planes[~masks])
        exact["pixel_auroc"] = rank_metrics(positive, negative).auroc
        if len(positive) and len(negative):
            tally = Tally(bin_edges(positive, negative))
            for plane, mask in zip(planes, masks, strict=True):
                tally.add(plane, mask)
            tallies["pixel_auroc"] = tally.tallies()
    return Measured(exact, tallies)


def _line(number: int, runs: Sequence[tuple[int, dict[str, Measured], Memory | None]]) -> dict[str, Any]:
    """One number of good parts: means over the draws, intervals over draws and pictures, and every run."""
    line: dict[str, Any] = {"good_parts": number, "draws": len(runs)}
    for metric in SHOT_METRICS:
        means: dict[str, float] = {}
        drawn: dict[str, Reals] = {}
        for name in runs[0][1]:
            values = [measured[name].exact[metric] for _, measured, _ in runs]
            if all(value is not None for value in values):
                means[name] = float(np.mean([value for value in values if value is not None]))
                parts = [measured[name].resampled(seed).get(metric, np.empty(0)) for seed, measured, _ in runs]
                drawn[name] = np.concatenate(parts)
        bounds = {name: interval(np.clip(values, 0.0, 1.0)) for name, values in drawn.items()}
        line[metric] = means
        line[f"{metric}_ci95"] = {name: list(both) for name, both in bounds.items() if both is not None}
        line[f"{metric}_gain"] = _gain(means, drawn)
    line["runs"] = [
        {
            "seed": seed,
            "outliers": memory.about.outliers if memory else 0,
            "place": memory.about.place if memory else None,
            **{metric: {name: one.exact[metric] for name, one in measured.items()} for metric in SHOT_METRICS},
        }
        for seed, measured, memory in runs
    ]
    return line


def _gain(means: dict[str, float], drawn: dict[str, Reals]) -> dict[str, Any] | None:
    """How much both are better than the better one alone; the interval from pairs, the same pictures for each."""
    if "both" not in means:
        return None
    better = max(("words", "memory"), key=lambda name: means[name])
    bounds = interval(drawn["both"] - drawn[better])
    return {"over": better, "value": means["both"] - means[better], "ci95": None if bounds is None else list(bounds)}


def _square(path: Path, edge: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(read_rgb(path), (edge, edge), interpolation=cv2.INTER_AREA), np.uint8)


def _now(inspector: Inspector) -> float:
    """Seconds: CPU time of this process on the CPU, so that others do not count; else until the device is done."""
    device = inspector.towers.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
