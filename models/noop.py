"""An engine that judges nothing and finds the same square in every picture: it measures what the agent costs.

It never says `pass`, because only an inspection may.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.engine import Judgement
from flawline.models.results import Defect, InspectionResult


class NoopEngine:
    """Every picture fails with a square of a tenth of its height in the middle."""

    def __init__(self) -> None:
        self._cached: dict[tuple[int, int], InspectionResult] = {}

    def load(
        self, bundle: str, device: str, precision: str, threads: int | None, recipes: dict[str, Recipe]
    ) -> dict[str, Any]:
        """Nothing to load."""
        return {
            "bundle": "noop",
            "bundle_sha256": None,
            "device": "none",
            "precision": "none",
            "thresholds": dict.fromkeys(recipes, 0.5),
        }

    def add_recipe(self, key: str, recipe: Recipe) -> float:
        """Any recipe will do."""
        return 0.5

    def learn(self, action: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Nothing is to be learnt."""
        raise ConfigError("the no-op engine learns nothing; set worker.engine to one that judges")

    def inspect(
        self,
        picture: NDArray[np.uint8],
        recipe: str,
        deadline_mono: float | None,
        degraded: Callable[[Judgement], None],
        busy: Callable[[], bool],
    ) -> Judgement:
        """The same result for every picture of a size."""
        height, width = picture.shape[:2]
        if (height, width) not in self._cached:
            edge = max(1, height // 10)
            x, y = (width - edge) // 2, (height - edge) // 2
            mask = np.zeros((height, width), bool)
            mask[y : y + edge, x : x + edge] = True
            defect = Defect((x, y, edge, edge), edge * edge, (x + (edge - 1) / 2, y + (edge - 1) / 2), 1.0)
            self._cached = {
                (height, width): InspectionResult(mask.astype(np.float32), mask, 1.0, 0.5, [defect], {"total": 0.0})
            }
        return Judgement(self._cached[(height, width)])
