"""Whether two ways of judging the same pictures say the same: decisions, masks, maps. NumPy only."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawline.models.results import InspectionResult

LEAST_IOU = 0.99
"""A faster way is kept to this: no decision changes, and the masks' overlap is at least so large on every picture."""


@dataclass(frozen=True)
class Agreement:
    """Of n pictures, judged two ways."""

    pictures: int
    decisions_changed: int
    least_mask_iou: float  # of the defects' masks; 1.0 where both are empty
    mean_mask_iou: float
    largest_map_difference: float  # of maps in [0, 1]
    largest_score_difference: float

    @property
    def held(self) -> bool:
        """No decision changed, and no mask by more than a hundredth."""
        return self.decisions_changed == 0 and self.least_mask_iou >= LEAST_IOU

    def as_dict(self) -> dict[str, Any]:
        """Its values and `held`."""
        return asdict(self) | {"held": self.held}


def mask_iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Shared pixels over those of either; 1.0 where there are none."""
    either = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / either) if either else 1.0


def agreement(exact: Sequence[InspectionResult], other: Sequence[InspectionResult]) -> Agreement:
    """Of results for the same pictures in the same order; there is at least one."""
    pairs = list(zip(exact, other, strict=True))
    overlaps = [mask_iou(one.mask, two.mask) for one, two in pairs]
    return Agreement(
        len(pairs),
        sum(one.passed != two.passed for one, two in pairs),
        round(min(overlaps), 5),
        round(float(np.mean(overlaps)), 5),
        round(max(float(np.abs(one.anomaly_map - two.anomaly_map).max()) for one, two in pairs), 6),
        round(max(abs(one.score - two.score) for one, two in pairs), 6),
    )
