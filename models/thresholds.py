"""Where CLIP's map is cut and where a part is rejected, chosen once on an auxiliary data set with masks.

The zero-shot protocol forbids test labels, so a bundle's thresholds come from another set than the one it is judged
on: S_a's from the largest pixel F1 of CLIP's map, then, with SAM asked about what S_a holds, the decision's from the
largest balanced accuracy of the image score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import tomlkit
from numpy.typing import NDArray

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.bundle import MANIFEST, Bundle, read_bundle, write_manifest
from flawline.models.datasets import Category
from flawline.models.evaluate import judge_locally
from flawline.models.ground_truth import truth
from flawline.models.inspector import Inspector
from flawline.models.row_maps import RowMaps
from flawline.models.study import AGENT, Row

STEPS = 1000  # S_a's threshold is found to a thousandth
CLIP_MAP = Row("map", "CLIP's map", "clip")


class Progress(Protocol):
    """Told what is going on."""

    def start(self, total: int) -> None:
        """So many pictures in all; each is judged twice."""

    def step(self, category: str) -> None:
        """One more is judged."""


@dataclass(frozen=True)
class Chosen:
    """Both thresholds, and how good each is on the pictures that it was chosen on."""

    region: float
    pixel_f1: float  # of CLIP's map cut there, pixels of all classes pooled
    decision: float
    balanced_accuracy: float  # mean share of good parts passed and of defective ones failed
    pictures: int


class PixelCounts:
    """How many defective and sound pixels have which value, in steps of a thousandth: maps need not be kept."""

    def __init__(self) -> None:
        self._inside = np.zeros(STEPS + 1, np.int64)
        self._outside = np.zeros(STEPS + 1, np.int64)

    def add(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
        """(H, W) in [0, 1] and its mask."""
        step = np.floor(anomaly_map * STEPS + 1e-4).astype(np.int64)
        self._inside += np.bincount(step[mask], minlength=STEPS + 1)
        self._outside += np.bincount(step[~mask], minlength=STEPS + 1)

    def best(self) -> tuple[float, float]:
        """The threshold (value >= it is defective) of the largest F1, and that F1; 0.0 where no pixel is defective."""
        gained = np.cumsum(self._inside[::-1])[::-1]
        wrong = np.cumsum(self._outside[::-1])[::-1]
        f1 = 2 * gained / np.maximum(gained + wrong + self._inside.sum(), 1)
        at = int(np.argmax(f1))
        return at / STEPS, float(f1[at])


def best_decision(scores: NDArray[np.float64], defective: NDArray[np.bool_], region: float) -> tuple[float, float]:
    """The threshold of the largest balanced accuracy, and that accuracy; both kinds of parts must be there.

    In the middle between the two scores that it parts, to thousandths where they are that far apart. Not below the
    region threshold, as far as a score reaches it: what CLIP's map is not cut at, SAM is never asked about.
    """
    reached = scores >= region
    candidates = np.unique(scores[reached] if reached.any() else scores)
    bad, good = np.sort(scores[defective]), np.sort(scores[~defective])
    failed = 1.0 - np.searchsorted(bad, candidates, side="left") / len(bad)
    passed = np.searchsorted(good, candidates, side="left") / len(good)
    at = int(np.argmax(failed + passed))
    above = float(candidates[at])
    below = max(scores[scores < above], default=above)
    middle = (above + (max(below, region) if reached.any() else below)) / 2
    rounded = round(middle, 3)
    return rounded if below < rounded <= above else middle, float(failed[at] + passed[at]) / 2


def choose_thresholds(
    inspector: Inspector, categories: Sequence[Category], recipes: dict[str, Recipe], progress: Progress
) -> Chosen:
    """Judge the test pictures of an auxiliary set twice: by CLIP alone, then with S_a cut where it is best.

    `recipes`: by category. Raises ConfigError where the set has no masks, or not both good and defective parts;
    ImageError naming the file.
    """
    samples = [sample for category in categories for sample in category.test]
    defective = np.array([sample.defective for sample in samples], bool)
    if not defective.any() or defective.all():
        raise ConfigError("thresholds need good and defective parts with masks; these are all of one kind")
    edge = inspector.towers.clip.input_size
    progress.start(2 * len(samples))
    counts, with_masks = PixelCounts(), 0
    for category in categories:
        judge = RowMaps(inspector, [CLIP_MAP], recipes[category.name], edge)
        for sample, judged in zip(category.test, judge_locally(judge, category.test, 1), strict=True):
            mask = truth(sample, (edge, edge), (edge, edge))
            if mask is not None:
                counts.add(judged.maps[CLIP_MAP.key], mask)
                with_masks += sample.defective
            progress.step(category.name)
    if not with_masks:
        raise ConfigError("thresholds need masks of defective parts; there are none")
    region, f1 = counts.best()
    scores: list[float] = []
    for category in categories:
        recipe = recipes[category.name]
        prompt = recipe.prompt.model_copy(update={"region_threshold": region})
        recipe = recipe.model_copy(update={"prompt": prompt})
        judge = RowMaps(inspector, [AGENT], recipe, edge)
        for judged in judge_locally(judge, category.test, recipe.min_defect_area_px):
            scores.append(judged.scores[AGENT.key])
            progress.step(category.name)
    decision, accuracy = best_decision(np.array(scores), defective, region)
    return Chosen(region, f1, decision, accuracy, len(samples))


def write_thresholds(bundle: Bundle, chosen: Chosen, chosen_on: str) -> Bundle:
    """Put both into bundle.toml; the rest of the file stays as it is. Raises BundleError naming the file.

    The bundle's hash is another one then: memories are to be learnt and thresholds calibrated again.
    """
    document = tomlkit.parse((bundle.folder / MANIFEST).read_text(encoding="utf-8"))
    table = tomlkit.table()
    table |= {"region": chosen.region, "decision": chosen.decision, "chosen_on": chosen_on}
    document["thresholds"] = table
    write_manifest(bundle.folder, tomlkit.dumps(document))
    return read_bundle(bundle.folder)
