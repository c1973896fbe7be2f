"""What a memory keeps of good parts: a core that covers them; and how good parts look to a memory of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawline.models.good_parts import FEW_GOOD_PARTS
from flawline.models.memory import nearest

BUDGET = 1500  # rows of the bank
CANDIDATES = 40_000  # descriptors that the bank is chosen from
LEAST_LAYOUT = 0.02  # parts that are all but equal may still differ so much
OUTLIER = 4.0
"""A good part is left out if its largest distance to the other good parts is this many robust standard deviations
above the median of the good parts' largest distances. One standard deviation is 1.4826 times the median absolute
deviation, or 5 % of the median where that is more."""


@dataclass(frozen=True)
class Scale:
    """The bundle's own scale: how far two good parts are from one another. Of drawn products, the median of what is
    ordinary and the upper quartile of what is striking."""

    ordinary: float = 0.3
    striking: float = 0.69
    layout: float = 0.3


OWN_SCALE = Scale()


@dataclass(frozen=True)
class Scores:
    """How good parts look to one another, and the core of them all."""

    core: Tensor  # (K, D + 2) of the rows given
    ordinary: float
    striking: float
    largest: NDArray[np.float64]  # of every picture


def leave_one_out(rows: Sequence[Tensor], budget: int) -> Scores:
    """How each picture's cells, (n, D + 2) descriptors with their places, look to a memory of the others.

    The core without one picture: what came from it is replaced by the nearest that others have. The bundle's
    own scale counts as one more picture, so that two or three do not say alone how much good parts differ.
    """
    candidates, source, core, core_source = core_of(rows, budget)
    if len(rows) < 2:
        return Scores(core, OWN_SCALE.ordinary, OWN_SCALE.striking, np.zeros(len(rows)))
    substitutes = torch.empty_like(core)
    for number in range(len(rows)):
        own = core_source == number
        if bool(own.any()):
            others = candidates[source != number]
            alike = core[own] @ others.T - 0.5 * others.square().sum(dim=1)
            substitutes[own] = others[alike.argmax(dim=1)]
    medians, largest = [], []
    for number, queries in enumerate(rows):
        own = core_source == number
        distances = nearest(queries, torch.cat([core[~own], substitutes[own]]))
        medians.append(float(distances.median()))
        largest.append(float(distances.max()))
    ordinary, striking = np.median([*medians, OWN_SCALE.ordinary]), np.median([*largest, OWN_SCALE.striking])
    return Scores(core, float(ordinary), float(striking), np.array(largest))


def core_of(rows: Sequence[Tensor], budget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates and the picture each is from, the core's rows and the picture each is from."""
    most = max(CANDIDATES // len(rows), 1)
    generator = torch.Generator().manual_seed(len(rows))
    parts = [
        part if len(part) <= most else part[torch.randperm(len(part), generator=generator)[:most].to(part.device)]
        for part in rows
    ]
    candidates = torch.cat(parts)
    counts = torch.tensor([len(part) for part in parts])
    source = torch.arange(len(parts)).repeat_interleave(counts).to(candidates.device)
    chosen = coreset(candidates, budget)
    return candidates, source, candidates[chosen], source[chosen]


def outliers(largest: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the good parts' largest distances stand out, by the rule at `OUTLIER`; none of fewer than five."""
    if len(largest) < FEW_GOOD_PARTS:
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


def farthest_layout(layouts: Tensor) -> float:
    """(N, T, L) -> the largest distance of a picture's layout to the nearest other one's; of fewer than five, the
    bundle's own where that is more."""
    count = len(layouts)
    largest = OWN_SCALE.layout if count < FEW_GOOD_PARTS else LEAST_LAYOUT
    if count < 2:
        return largest
    for number in range(count):
        others = torch.cat([layouts[:number], layouts[number + 1 :]])
        alike = torch.einsum("tl,ntl->tn", layouts[number], others).amax(dim=1)
        largest = max(largest, float((1.0 - alike).max()))
    return largest
