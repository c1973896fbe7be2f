"""What a memory keeps of good parts: a core that covers them; and which of them it leaves out."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_FOR_OUTLIERS = 5
OUTLIER = 4.0
"""A good part is left out if its largest distance to the other good parts is this many robust standard deviations
above the median of the good parts' largest distances. One standard deviation is 1.4826 times the median absolute
deviation, or 5 % of the median where that is more."""


def outliers(largest: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the good parts' largest distances stand out, by the rule at `OUTLIER`; none of fewer than five."""
    if len(largest) < LEAST_FOR_OUTLIERS:
        return np.zeros(len(largest), bool)
    middle = float(np.median(largest))
    deviation = max(1.4826 * float(np.median(np.abs(largest - middle))), 0.05 * middle)
    return np.asarray(largest > middle + OUTLIER * deviation)


def coreset(candidates: Tensor, budget: int) -> Tensor:
    """(n, D) -> numbers of at most `budget` rows that cover the others, greedily: always the row that is farthest
    from those taken (k-centre), beginning with the farthest from the mean. The same rows give the same numbers."""
    count = len(candidates)
    if count <= budget:
        return torch.arange(count, device=candidates.device)
    squares = candidates.square().sum(dim=1)
    mean = candidates.mean(dim=0)
    newest = int((squares - 2.0 * (candidates @ mean)).argmax())
    chosen = [newest]
    gap = squares + squares[newest] - 2.0 * (candidates @ candidates[newest])
    while len(chosen) < budget:
        newest = int(gap.argmax())
        chosen.append(newest)
        torch.minimum(gap, squares + squares[newest] - 2.0 * (candidates @ candidates[newest]), out=gap)
    return torch.tensor(chosen, device=candidates.device)
