"""Smaller SAMs and other precisions beside the exact one: how fast, and whether they still say the same."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from flawline.config.recipe import PromptSettings, Recipe
from flawline.models.agreement import agreement
from flawline.models.bench import Source
from flawline.models.bench_reference import Picture
from flawline.models.inspector import Inspector
from flawline.models.results import InspectionResult
from flawline.models.switches import PLAIN, Switches

SUSPICIOUS = Recipe(prompt=PromptSettings(region="top_percent"))
"""Finds something on every picture, so that SAM runs."""


def guard(
    source: Source, pictures: Sequence[Picture], precisions: Sequence[str], on_row: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Each precision, and each switch alone at fp32, against fp32 with everything plain: the models' own verdicts."""
    inspector = Inspector(source("fp32", PLAIN))
    exact = _judge(inspector, pictures, Recipe())
    rows = []
    for precision, switches in _ways(precisions, inspector.towers.device):
        inspector = Inspector(source(precision, switches))
        graphs = inspector.towers.graphs
        # A shape runs as it is when first seen, is captured when it comes again, and replayed the third time.
        for _ in range(2 if graphs.enabled else 0):
            _judge(inspector, pictures, Recipe())
        before = graphs.as_they_are
        say = agreement(exact, _judge(inspector, pictures, Recipe()))
        dtype = str(inspector.towers.dtype).removeprefix("torch.")
        row = {"precision": dtype, "switches": switches.as_dict(), **say.as_dict()}
        if graphs.enabled:
            row |= {"graphs_captured": graphs.tries - graphs.left_out, "graphs_left_out": graphs.left_out}
            row["held"] = say.held and graphs.as_they_are == before  # else it says nothing of graphs
        rows.append(row)
        del inspector
        on_row()
    return rows


def _ways(precisions: Sequence[str], device: torch.device) -> list[tuple[str, Switches]]:
    plain = replace(PLAIN, heap=Switches().heap)  # where memory lies changes no value
    alone = [replace(plain, attention="mask"), replace(plain, attention="extended"), replace(plain, batchnorm="folded")]
    if device.type == "cuda":
        alone.append(Switches(graphs="on"))  # with what can be captured: segment_anything's own attention cannot
    return [("fp32", switches) for switches in alone] + [(precision, Switches()) for precision in precisions]


def variants(
    sources: dict[str, Source],
    precision: str,
    pictures: Sequence[Picture],
    runs: int,
    *,
    compare: bool,
    on_row: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Median milliseconds of a suspicious frame with each source, and its agreement with the first one's verdicts.

    The first picture is timed. Agreement is left out where it would say nothing: with random weights.
    """
    rows: list[dict[str, Any]] = []
    first: list[InspectionResult] | None = None
    for name, source in sources.items():
        inspector = Inspector(source(precision, Switches.from_environment()))
        laps = []
        stages: list[dict[str, float]] = []
        for number in range(1 + runs):
            started = time.perf_counter()
            result = inspector.inspect(pictures[0], SUSPICIOUS)
            if number:
                laps.append((time.perf_counter() - started) * 1000.0)
                stages.append(result.stage_ms)
        row: dict[str, Any] = {"variant": name, "suspicious_ms": round(statistics.median(laps), 2)}
        row["encode_ms"] = round(statistics.median(one["encode"] for one in stages), 2)
        if compare:
            results = _judge(inspector, pictures, Recipe())
            first = results if first is None else first
            row["agreement"] = agreement(first, results).as_dict()
        rows.append(row)
        del inspector
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        on_row()
    return rows


def _judge(inspector: Inspector, pictures: Sequence[Picture], recipe: Recipe) -> list[InspectionResult]:
    return [inspector.inspect(picture, recipe) for picture in pictures]
