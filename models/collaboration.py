"""The worker's engine: CLIP and SAM together, and the ladder that keeps a deadline without SAM."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flawline.config.errors import BundleError, ConfigError, FlawlineError
from flawline.config.recipe import Recipe
from flawline.models.engine import Judgement
from flawline.models.evidence import Encoded, Evidence, points_in_frame
from flawline.models.inspector import Inspector
from flawline.models.memory_session import MemorySession
from flawline.models.towers import load_towers

MARGIN_S = 0.015
"""What publishing wants of a deadline after the judgement: the mask's way through the ring, the commit."""
CAUTION = 1.25
"""Factor on the running estimate of SAM's time."""
MOST_WARM = 4  # passes at the start
WARM = ""
"""No recipe's key: what running everything once said."""


class CollaborationEngine:
    """Judges by recipes; when SAM will not fit before a deadline, the CLIP map decides first."""

    def __init__(self) -> None:
        self._inspector: Inspector
        self._recipes: dict[str, Recipe] = {}
        self._session: MemorySession | None = None
        # Running estimates by recipe, of one suspicious tile: from the map to the judgement. WARM holds for new ones.
        self._sam_s: dict[str, float] = {WARM: 0.0}
        self.tile_batch: int | None = None

    def load(
        self, bundle: str, device: str, precision: str, threads: int | None, recipes: dict[str, Recipe]
    ) -> dict[str, Any]:
        """Load the bundle, make the recipes ready and run everything once."""
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) - 1))
        towers = load_towers(bundle, device, precision)
        self._inspector = Inspector(towers)
        thresholds = {key: self.add_recipe(key, recipe) for key, recipe in recipes.items()}
        self._warm_up()
        return {
            "bundle": towers.bundle.name,
            "bundle_sha256": towers.bundle.sha256,
            "device": str(towers.device),
            "precision": str(towers.dtype).removeprefix("torch."),
            "thresholds": thresholds,
        }

    def add_recipe(self, key: str, recipe: Recipe) -> float:
        """Compute the recipe's text features; returns its decision threshold."""
        try:
            prepared = self._inspector.prepare(recipe)
        except FlawlineError as error:  # of its memory too
            raise BundleError(f"recipe {key.partition('@')[0]!r}: {error}") from error
        self._recipes[key] = recipe
        return prepared.threshold

    def learn(self, action: str, fields: dict[str, Any]) -> dict[str, Any]:
        """See `Engine.learn`."""
        if action == "discard":
            self._session = None
            return {}
        if action == "start":
            self._session = MemorySession(self._inspector, fields["recipe"], self._recipes[fields["key"]])
        session = self._session
        if session is None:
            raise ConfigError("nothing is being learnt")
        match action:
            case "add":
                session.add(fields["picture"], fields["name"])
            case "refuse":
                session.refuse(fields["text"])
            case "commit":
                made = session.commit(Path(fields["folder"]), bool(fields["keep_all"]))
                self._session = None
                return made
        return session.status()

    def _warm_up(self) -> None:
        """A suspicious picture again and again: the first pass pays for allocation, the next one perhaps for graphs.

        The first after those that captures none is the estimate. A clean picture goes no way that this one does not go.
        """
        grey = np.random.default_rng(0).integers(96, 160, (480, 640, 3), dtype=np.uint8)
        everything = Recipe.model_validate({"prompt": {"region_threshold": 0.0}})
        graphs = self._inspector.towers.graphs
        for number in range(MOST_WARM):
            tries = graphs.tries
            encoded = self._inspector.encode([grey], everything)
            began = time.monotonic()
            self._inspector.judge(encoded, everything)
            self._sam_s = {WARM: time.monotonic() - began}
            if number and graphs.tries == tries:
                break

    def inspect(
        self,
        picture: NDArray[np.uint8],
        recipe: str,
        deadline_mono: float | None,
        degraded: Callable[[Judgement], None],
        busy: Callable[[], bool] = lambda: False,
    ) -> Judgement:
        """Judge (H, W, 3) uint8 RGB; see `Engine.inspect`."""
        inspector, rules = self._inspector, self._recipes[recipe]
        inspector.tile_batch = self.tile_batch or Inspector.tile_batch
        encoded = inspector.encode([picture], rules)
        located = inspector.evidence(encoded, rules, clip_only=True)
        if located.suspicious and deadline_mono is not None:  # having read that, CLIP's time is over and known
            left = deadline_mono - time.monotonic() - MARGIN_S
            expected = self._sam_s.get(recipe, self._sam_s[WARM]) * len(located.suspicious)
            if left < CAUTION * expected:
                by_clip = Judgement(inspector.decide(encoded, located, rules, clip_only=True)[0])
                if left > 0.0:
                    degraded(by_clip)
                if busy():  # what waits may still be in time
                    return by_clip
        tries = inspector.towers.graphs.tries
        began = time.monotonic()
        evidence = inspector.evidence(encoded, rules, located=located)
        result = inspector.decide(encoded, evidence, rules)[0]
        if evidence.refined is not None and inspector.towers.graphs.tries == tries:
            before = self._sam_s.get(recipe, self._sam_s[WARM])
            taken = (time.monotonic() - began) / len(located.suspicious)
            self._sam_s[recipe] = before + 0.2 * (taken - before)
        return Judgement(result, _points(encoded, evidence))


def _points(encoded: Encoded, evidence: Evidence) -> list[tuple[float, float, int]]:
    refined = evidence.refined
    if refined is None:
        return []
    points: list[tuple[float, float, int]] = []
    for place in range(len(refined.rows)):
        where, labels = points_in_frame(encoded, refined, place)
        points += [(float(x), float(y), int(label)) for (x, y), label in zip(where, labels, strict=True)]
    return points
