"""What the worker judges with: the seam between the process (worker.py) and the models (inspector.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flawline.config.recipe import Recipe
from flawline.models.results import InspectionResult


@dataclass(frozen=True, slots=True)
class Judgement:
    """A result and the point prompts that led to it, in pixels of the captured frame."""

    result: InspectionResult
    points: list[tuple[float, float, int]] = field(default_factory=list)  # x, y, 1 positive or 0 negative


class Engine(Protocol):
    """Judges pictures. Made with no arguments, then loaded once; everything blocks."""

    def load(
        self, bundle: str, device: str, precision: str, threads: int | None, recipes: dict[str, Recipe]
    ) -> dict[str, Any]:
        """Load and warm up. Returns what is known of the models: bundle, bundle_sha256, device, precision,
        and `thresholds`, the decision threshold per recipe key."""

    def add_recipe(self, key: str, recipe: Recipe) -> float:
        """Make a recipe known; returns its decision threshold. Raises FlawlineError where it does not fit."""

    def inspect(
        self,
        picture: NDArray[np.uint8],
        recipe: str,
        deadline_mono: float | None,
        degraded: Callable[[Judgement], None],
    ) -> Judgement:
        """Judge (H, W, 3) uint8 RGB. Where SAM will not fit before the deadline, `degraded` is called with
        the CLIP-only judgement first, and the returned one is its refinement."""


class InspectorEngine:
    """The real one: CLIP and SAM."""

    def __init__(self) -> None:
        self._inspectors: dict[str, Any] = {}

    def load(
        self, bundle: str, device: str, precision: str, threads: int | None, recipes: dict[str, Recipe]
    ) -> dict[str, Any]:
        """Load the bundle once; recipes share its modules."""
        import torch

        from flawline.models.inspector import Inspector

        if threads is not None:
            torch.set_num_threads(threads)
        keys = list(recipes)
        first = Inspector.load(bundle, device=device, precision=precision, recipe=recipes[keys[0]])
        self._inspectors = {keys[0]: first}
        for key in keys[1:]:
            self._inspectors[key] = first.with_recipe(recipes[key])
        first.warm_up()
        return {
            **first.provenance,
            "device": str(first.device),
            "precision": first.precision,
            "thresholds": {key: inspector.threshold for key, inspector in self._inspectors.items()},
        }

    def add_recipe(self, key: str, recipe: Recipe) -> float:
        """Share the loaded modules with one more recipe."""
        inspector = next(iter(self._inspectors.values())).with_recipe(recipe)
        self._inspectors[key] = inspector
        return float(inspector.threshold)

    def inspect(
        self,
        picture: NDArray[np.uint8],
        recipe: str,
        deadline_mono: float | None,
        degraded: Callable[[Judgement], None],
    ) -> Judgement:
        """CLIP, then SAM; with a deadline that SAM would miss, the CLIP map's judgement goes out in between."""
        inspector = self._inspectors[recipe]
        state = inspector.localise(picture)
        if deadline_mono is not None and state.suspicious and inspector.would_miss(deadline_mono):
            degraded(Judgement(state.degraded_result()))
        result, points = inspector.refine(state)
        return Judgement(result, points)
