"""docs/verdicts.md says what is on the wire: a key or a reason that the agent writes has its row there."""

import re
from pathlib import Path
from typing import get_args

from flawline.agent.verdict import ActiveRecipe, Job, Outcome, Reason, VerdictWriter
from flawline.config.recipe import Recipe
from flawline.models.results import Defect

PAGE = (Path(__file__).parents[2] / "docs/verdicts.md").read_text(encoding="utf-8")


def rows() -> set[str]:
    """The names in the first columns of the tables of the wire."""
    wire = PAGE[PAGE.index("## On the wire") : PAGE.index("## Triggers")]
    firsts = re.findall(r"^\| ([^|]+) \|", wire, re.MULTILINE)
    return {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}


def test_every_key_of_a_verdict_has_a_row() -> None:
    job = Job("top", ActiveRecipe("default", 1, Recipe(), None), 0, 0.0)
    writer = VerdictWriter("line1", "a", "1")
    defect = Defect((0, 0, 1, 1), 1, (0.0, 0.0), 1.0, area_mm2=1.0)
    judged = writer.judged(job, Outcome(1.0, 0.5, [defect], {}, 0))
    error = writer.error(job, "internal", "why")
    keys = {*judged, *error, *(f"defects[].{key}" for key in defect)}
    assert keys - rows() == set()


def test_every_reason_has_a_row() -> None:
    assert {*get_args(Reason), "clip_only"} - rows() == set()
