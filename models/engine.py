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

    tile_batch: int | None
    """Tiles that go through a tower at once; None, as it begins: the usual. The worker sets 1 where memory ran out."""

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
        busy: Callable[[], bool] = lambda: False,
    ) -> Judgement:
        """Judge (H, W, 3) uint8 RGB. Where SAM will not fit before the deadline, `degraded` is called with
        the CLIP-only judgement first, and the returned one is its refinement; or the same again (`degraded` in its
        result), where `busy` says that other frames wait, as it is for a frame whose deadline has passed."""

    def learn(self, action: str, fields: dict[str, Any]) -> dict[str, Any]:
        """`start` a collection of good parts (`key`, `recipe`), `add` (`picture`, `name`) or `refuse` (`text`) one,
        `commit` (`folder`, `keep_all`) or `discard` it. `commit` may run beside `inspect`. Raises FlawlineError."""
