"""What an evaluation compares: the rows of the paper's tables, and the numbers printed there. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe

Source = Literal["agent", "clip", "boxes", "blur", "contrast", "peer"]
Printed = tuple[float | None, float | None, float | None]  # pixel AUROC, F1-max, AP in percent


@dataclass(frozen=True)
class Row:
    """One line of a table. `source` None: it can't be rebuilt exactly here, only the printed numbers are shown;
    `peer`: it runs where its models are given (`--peer`)."""

    key: str
    title: str
    source: Source | None
    change: Mapping[str, Any] = field(default_factory=dict)  # recipe keys that differ
    printed: Mapping[str, Printed] = field(default_factory=dict)  # by data set
    note: str = ""

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe of this row."""
        table = base.model_dump()
        for key, value in self.change.items():
            table[key] = {**table[key], **value} if isinstance(value, Mapping) else value
        return Recipe.model_validate(table)


def _both(mvtec: Printed, visa: Printed) -> dict[str, Printed]:
    return {"mvtec": mvtec, "visa": visa}


AGENT = Row("flawline", "flawline", "agent", printed=_both((89.5, 48.8, 46.4), (94.8, 36.5, 28.0)))

TABLE1 = (
    Row(
        "windows",
        "windows of CLIP (WinCLIP-like)",
        "clip",
        {"localiser": "windows"},
        _both((85.1, 31.7, None), (79.6, 14.8, None)),
        "printed: WinCLIP at 240 px",
    ),
    Row(
        "clip",
        "CLIP map alone (APRIL-GAN)",
        "clip",
        {"localiser": "adapter"},
        _both((87.6, 43.3, 40.8), (94.2, 32.3, 25.7)),
    ),
    Row("sdp", "SDP", "peer", {}, _both((88.7, 35.3, 28.5), (84.1, 16.0, 9.6)), "in its own frame and words"),
    Row("sdp_plus", "SDP+", "peer", {}, _both((91.2, 41.9, 39.4), (94.8, 26.5, 20.3)), "in its own frame and words"),
    Row("anomalyclip", "AnomalyCLIP", "peer", {}, _both((91.1, 39.1, 34.5), (95.5, 28.3, 21.3)), "its own words"),
    Row(
        "boxes",
        "SAM, boxes from the CLIP map (SAA-like)",
        "boxes",
        {},
        _both((67.7, 23.8, 15.2), (83.7, 12.8, 5.5)),
        "printed: SAA, whose boxes come from GroundingDINO",
    ),
    Row("saa_plus", "SAA+", None, {}, _both((73.2, 37.8, 28.8), (74.0, 27.1, 22.4))),
    Row("clipsam", "ClipSAM", None, {}, _both((92.3, 47.8, 45.9), (95.6, 33.1, 26.0))),
    AGENT,
)

_TABLE2: tuple[tuple[str, int, Printed], ...] = (
    ("cross", 20, (89.5, 46.8, 44.1)),
    ("cross", 25, (89.2, 46.5, 44.1)),
    ("cross", 30, (89.3, 46.3, 44.5)),
    ("rect", 20, (89.5, 47.7, 45.6)),
    ("rect", 25, (89.4, 46.9, 43.9)),
    ("rect", 30, (89.0, 45.0, 42.2)),
    ("ellipse", 20, (89.1, 47.2, 45.3)),
    ("ellipse", 25, (89.5, 48.8, 46.4)),
    ("ellipse", 30, (89.4, 46.9, 44.5)),
)
TABLE2 = tuple(
    Row(
        f"{shape}_{size}",
        f"dilation {shape} {size} x {size}",
        "agent",
        {"prompt": {"kernel": shape, "kernel_size": size}},
        {"mvtec": printed},
    )
    for shape, size, printed in _TABLE2
)
TABLE3 = (
    Row("level_1", "points", "agent", {"cascade": {"levels": 1}}, {"mvtec": (88.7, 42.5, 39.2)}),
    Row("level_2", "points, logits 1", "agent", {"cascade": {"levels": 2}}, {"mvtec": (88.1, 46.8, 44.8)}),
    Row("level_3", "points, logits 2, box", "agent", {"cascade": {"levels": 3}}, {"mvtec": (89.5, 48.8, 46.4)}),
)
BASELINES = (
    Row("contrast", "colour contrast against a blurred copy", "contrast", note="no model at all"),
    Row("blur", "CLIP map and blurred S_a", "blur", note="the same fusion without SAM"),
)
ABLATIONS = {"table2": TABLE2, "table3": TABLE3}


def rows_of(ablations: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """The rows to evaluate, each once, the agent's own among them. Raises ConfigError for an unknown name.

    `methods`: `all` for the paper's Table 1, or keys of single rows.
    """
    by_key = {row.key: row for row in (*TABLE1, *BASELINES)}
    rows: dict[str, Row] = {}
    for name in ablations:
        if name not in ABLATIONS:
            raise ConfigError(f"--ablation {name}: not known (there are: {', '.join(ABLATIONS)})")
        rows |= {row.key: row for row in ABLATIONS[name]}
    for name in methods:
        if name == "all":
            rows |= {row.key: row for row in TABLE1}
        elif name in by_key:
            rows[name] = by_key[name]
        else:
            raise ConfigError(f"--methods {name}: not known (there are: all, {', '.join(by_key)})")
    rows[AGENT.key] = AGENT
    return list(rows.values())
