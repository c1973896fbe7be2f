"""The ladder: when SAM will not fit before a deadline, by its running estimate, the CLIP map's verdict goes first."""

import time

import numpy as np
import pytest
import torch
from tiny_bundle import write_tiny_bundle

from flawline.config.recipe import Recipe
from flawline.models.collaboration import WARM, CollaborationEngine
from flawline.models.engine import Judgement

LEFT_S = 20.0  # until the deadline: ample for the tiny bundle on any machine
TOO_LONG_S, SHORT_S = 2 * LEFT_S, 0.001


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> CollaborationEngine:
    torch.set_num_threads(1)
    engine = CollaborationEngine()
    recipes = {
        name: Recipe.model_validate({"prompt": {"region_threshold": threshold}})
        for name, threshold in (("suspects all", 0.0), ("suspects nothing", 1.0))
    }
    engine.load(str(write_tiny_bundle(tmp_path_factory.mktemp("tiny"))), "cpu", "fp32", 1, recipes)
    return engine


def inspect(
    engine: CollaborationEngine, recipe: str, left_s: float | None, *, busy: bool = False
) -> tuple[list[Judgement], Judgement]:
    """What was said first, for want of time, and what was said in the end."""
    picture = np.random.default_rng(0).integers(90, 160, (64, 96, 3), dtype=np.uint8)
    first: list[Judgement] = []
    deadline = None if left_s is None else time.monotonic() + left_s
    return first, engine.inspect(picture, recipe, deadline, first.append, lambda: busy)


@pytest.mark.parametrize("left_s", [LEFT_S, -1.0])
def test_sam_does_not_run_for_what_is_answered_while_others_wait(engine: CollaborationEngine, left_s: float) -> None:
    """Those may still be in time. What waits changes nothing for a frame that has time, or that is owed no deadline."""
    engine._sam_s = {WARM: TOO_LONG_S}
    first, last = inspect(engine, "suspects all", left_s, busy=True)
    assert (last.result.degraded, last.result.refined, bool(last.result.defects)) == (True, False, True)
    assert len(first) == (left_s > 0)
    assert inspect(engine, "suspects all", None, busy=True)[1].result.refined
    engine._sam_s = {WARM: SHORT_S}
    assert inspect(engine, "suspects all", LEFT_S, busy=True)[1].result.refined


def test_an_estimate_too_long_gives_the_clip_maps_verdict_first(engine: CollaborationEngine) -> None:
    engine._sam_s = {WARM: TOO_LONG_S}
    (first,), last = inspect(engine, "suspects all", LEFT_S)
    assert (first.result.degraded, first.result.refined, first.points) == (True, False, [])
    assert (last.result.degraded, last.result.refined) == (False, True)
    assert last.points
    assert first.result.defects, "everything is suspect: the CLIP map alone may not pass it"


def test_an_estimate_that_fits_leaves_one_verdict(engine: CollaborationEngine) -> None:
    engine._sam_s = {WARM: SHORT_S}
    first, last = inspect(engine, "suspects all", LEFT_S)
    assert (first, last.result.degraded, last.result.refined) == ([], False, True)


@pytest.mark.parametrize(
    ("recipe", "left_s"), [("suspects nothing", LEFT_S), ("suspects all", None), ("suspects all", -1.0)]
)
def test_nothing_goes_first_without_need(engine: CollaborationEngine, recipe: str, left_s: float | None) -> None:
    """SAM need not run; there is no deadline; or it has passed, and the agent has answered."""
    engine._sam_s = {WARM: TOO_LONG_S}
    first, last = inspect(engine, recipe, left_s)
    assert (first, last.result.degraded, last.result.refined) == ([], False, recipe == "suspects all")


def test_the_estimate_follows_what_sam_really_takes(engine: CollaborationEngine) -> None:
    engine._sam_s = {WARM: TOO_LONG_S}
    degraded = [len(inspect(engine, "suspects all", LEFT_S)[0]) for _ in range(12)]
    assert degraded[0] == 1
    assert degraded[-1] == 0
    assert degraded == sorted(degraded, reverse=True)
    assert engine._sam_s["suspects all"] < LEFT_S / 4


def test_tiles_count_and_one_recipes_tiles_say_nothing_of_anothers(engine: CollaborationEngine) -> None:
    tiled = Recipe.model_validate(
        {"prompt": {"region_threshold": 0.0}, "tiling": {"enabled": True, "size": 128, "overlap": 0}}
    )
    engine.add_recipe("tiled", tiled)
    picture = np.random.default_rng(0).integers(90, 160, (256, 256, 3), dtype=np.uint8)
    engine._sam_s = {WARM: LEFT_S / 3}  # one tile fits, four do not
    first: list[Judgement] = []
    engine.inspect(picture, "tiled", time.monotonic() + LEFT_S, first.append, lambda: False)
    assert len(first) == 1
    assert inspect(engine, "suspects all", LEFT_S)[0] == []
    for _ in range(30):
        inspect(engine, "suspects all", None)
    assert engine._sam_s["suspects all"] < engine._sam_s["tiled"] < engine._sam_s[WARM]
