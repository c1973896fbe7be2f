"""An engine that does what the picture tells it, so that a test can make the worker pass, fail, dawdle or die.

A picture's first pixel is an order: red says what to do (KINDS), green is the picture's own number, blue a time in
units of 10 ms. Every inspection that completes is noted in the file $SCRIPT_LEDGER: kind, number.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flawline.config.errors import ImageError
from flawline.config.recipe import Recipe
from flawline.models.engine import Judgement
from flawline.models.results import Defect, InspectionResult

KINDS = ("good", "bad", "degraded", "crash", "hang", "stop", "oom", "oom_once", "wrong", "unreadable", "hurried")


def write_order(file: Path, kind: str, number: int, wait_ms: int = 0, size: tuple[int, int] = (48, 64)) -> None:
    """A picture that makes the engine do `kind`, after `wait_ms`."""
    picture = np.full((*size, 3), 128, np.uint8)
    picture[0, 0] = (wait_ms // 10, number % 256, KINDS.index(kind))  # OpenCV's order: blue, green, red
    cv2.imwrite(str(file), picture)


class OutOfMemoryError(RuntimeError):
    """Called like CUDA's."""


class ScriptedEngine:
    """A recipe whose object is `refuse me` is refused; over one that is `hang` the engine hangs.

    It says its precision where the configuration does; older engines say none.
    """

    def __init__(self) -> None:
        self._failed_once: set[int] = set()

    def load(
        self, bundle: str, device: str, precision: str, threads: int | None, recipes: dict[str, Recipe]
    ) -> dict[str, Any]:
        about = {"bundle": "scripted", "bundle_sha256": "0" * 64, "thresholds": dict.fromkeys(recipes, 0.5)}
        return (
            about if precision == "auto" else about | {"precision": {"fp32": "float32", "bf16": "bfloat16"}[precision]}
        )

    def add_recipe(self, key: str, recipe: Recipe) -> float:
        if recipe.object == "refuse me":
            raise ImageError(f"recipe {key}: object: this engine was told to refuse it")
        if recipe.object == "hang":
            time.sleep(3600)
        return 0.25 if recipe.threshold is None else recipe.threshold

    def inspect(
        self,
        picture: np.ndarray,
        recipe: str,
        deadline_mono: float | None,
        degraded: Callable[[Judgement], None],
        busy: Callable[[], bool],
    ) -> Judgement:
        red, number, wait = (int(value) for value in picture[0, 0])
        kind = KINDS[red]
        shape = picture.shape[:2]
        match kind:
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                time.sleep(3600)
            case "oom":
                raise OutOfMemoryError("CUDA out of memory")
            case "oom_once" if number not in self._failed_once:
                self._failed_once.add(number)
                raise OutOfMemoryError("CUDA out of memory")
            case "wrong":
                raise ValueError("this engine was told to fail")
            case "unreadable":
                raise ImageError("this engine was told not to like the picture")
            case "degraded" | "hurried":
                degraded(_judgement(shape, edge=4, degraded=True))
        time.sleep(wait / 100)
        note(kind, number)
        if kind == "hurried" and busy():
            return _judgement(shape, edge=4, degraded=True)
        return _judgement(shape, edge={"bad": 4, "degraded": 8, "hurried": 8}.get(kind, 0))


def note(kind: str, number: int) -> None:
    """One line in the ledger; appended at once, so that a kill loses none."""
    if ledger := os.environ.get("SCRIPT_LEDGER"):
        with open(ledger, "a") as out:
            out.write(f"{kind} {number}\n")


def _judgement(shape: tuple[int, int], edge: int, degraded: bool = False) -> Judgement:
    mask = np.zeros(shape, bool)
    mask[:edge, :edge] = True
    defects = [Defect((0, 0, edge, edge), edge * edge, (edge / 2, edge / 2), 0.9)] if edge else []
    score = 0.9 if edge else 0.1
    result = InspectionResult(mask.astype(np.float32), mask, score, 0.5, defects, {"clip": 1.0}, degraded=degraded)
    return Judgement(result)
