"""What an inspection returns. No torch here: the agent, tests and user programs import these freely."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

STAGES = ("clip", "encode", "prompt", "cascade")
"""What an inspection does one after the other; their times add up to its `total`, but for what lies between them."""


class Defect(dict[str, Any]):
    """One connected region of the mask, in pixels of the captured frame: the map that goes on the wire.

    What it holds can be read by key or as an attribute. `area_mm2` is there only where the recipe has a scale.
    """

    def __init__(
        self,
        bbox: tuple[int, int, int, int],
        area_px: int,
        centroid: tuple[float, float],
        score: float,
        area_mm2: float | None = None,
    ) -> None:
        super().__init__(bbox=list(bbox), area_px=area_px, centroid=list(centroid), score=score)
        if area_mm2 is not None:
            self["area_mm2"] = area_mm2

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """x, y, w, h."""
        x, y, w, h = self["bbox"]
        return x, y, w, h

    @property
    def area_px(self) -> int:
        """Pixels."""
        return int(self["area_px"])

    @property
    def centroid(self) -> tuple[float, float]:
        """x, y."""
        x, y = self["centroid"]
        return x, y

    @property
    def score(self) -> float:
        """Largest value of the anomaly map inside, in [0, 1]."""
        return float(self["score"])

    @property
    def area_mm2(self) -> float | None:
        """None where there is no scale."""
        return self.get("area_mm2")


@dataclass(frozen=True, slots=True)
class InspectionResult:
    """The outcome for one picture of H x W pixels.

    `score` is the largest threshold at which a defect of the recipe's least area would remain, so
    `defects` is non-empty if and only if `score >= threshold`.
    """

    anomaly_map: NDArray[np.float32]  # (H, W) in [0, 1]
    mask: NDArray[np.bool_]  # (H, W), union of the defects
    score: float
    threshold: float
    defects: list[Defect]
    stage_ms: dict[str, float] = field(default_factory=dict)  # of STAGES, and their `total`
    degraded: bool = False  # decided by the CLIP map alone because SAM was left out for lack of time
    refined: bool = False  # SAM ran
    warning: str | None = None  # of the recipe or of this picture: docs/verdicts.md has the list

    @property
    def passed(self) -> bool:
        """True if there is no defect."""
        return not self.defects


@dataclass(frozen=True, slots=True)
class CascadeStage:
    """One level of the cascade (equations 9, 10, 12)."""

    logits: NDArray[np.float32]  # raw low-resolution logits of the chosen mask, (4h, 4w); (256, 256) for SAM
    mask: NDArray[np.bool_]  # (H, W)
    score: float  # the decoder's own estimate of the mask's IoU
    index: int  # which of the masks was chosen, 0 to 2


@dataclass(frozen=True, slots=True)
class InspectionTrace:
    """An inspection with every intermediate, for tests and papers. Where S_a is empty, SAM did not run:
    `points` is (0, 2), `stages` is [], `sam_embedding` and `box` are None. What the result says is said here too."""

    result: InspectionResult
    clip_map: NDArray[np.float32]  # (S, S) in [0, 1], mean over the tapped layers, CLIP's input frame
    region: NDArray[np.bool_]  # (S, S), S_a
    sam_embedding: NDArray[np.float32] | None  # (C, h, w)
    points: NDArray[np.float32]  # (n, 2), x then y, pixels of the given image
    labels: NDArray[np.int64]  # (n,), 1 positive, 0 negative
    box: NDArray[np.float32] | None  # (4,) x0, y0, x1, y1, pixels of the given image
    stages: list[CascadeStage]

    @property
    def anomaly_map(self) -> NDArray[np.float32]:
        """(H, W) in [0, 1]."""
        return self.result.anomaly_map

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W), union of the defects."""
        return self.result.mask

    @property
    def score(self) -> float:
        """Of the picture."""
        return self.result.score

    @property
    def threshold(self) -> float:
        """What the score was compared with."""
        return self.result.threshold

    @property
    def defects(self) -> list[Defect]:
        """Largest first."""
        return self.result.defects

    @property
    def passed(self) -> bool:
        """True if there is no defect."""
        return self.result.passed

    @property
    def stage_ms(self) -> dict[str, float]:
        """How long the parts took."""
        return self.result.stage_ms
