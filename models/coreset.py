"""What a memory keeps of good parts: a core that covers them; and how good parts look to a memory of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawline.models.memory import nearest

BUDGET = 1500  # rows of the bank
CANDIDATES = 40_000  # descriptors that the bank is chosen from
FEW = 5
LEAST_LAYOUT = 0.02  # parts that are all but equal may still differ so much
OUTLIER = 4.0
"""A good part is left out if its largest distance to the other good parts is this many robust standard deviations
above the median of the good parts' largest distances. One standard deviation is 1.4826 times the median absolute
deviation, or 5 % of the median where that is more."""


@dataclass(frozen=True)
class Scale:
    """The bundle's own scale: how far two good parts are from one another. Of drawn products, the median of what is
    ordinary and the upper quartile of what is striking."""

    ordinary: float = 0.35
    striking: float = 0.86
    beyond_ordinary: float = 0.0
    beyond_striking: float = 7.6
    layout: float = 0.3


OWN_SCALE = Scale()


@dataclass(frozen=True)
class Scores:
    """How good parts look to one another, and the core of them all."""

    core: Tensor  # (K, D + 2) of the rows given
    told: Tensor  # (K,) what the words say of them, logits
    ordinary: float
    striking: float
    beyond_ordinary: float
    beyond_striking: float
    largest: NDArray[np.float64]  # of every picture


def leave_one_out(rows: Sequence[Tensor], told: Sequence[Tensor], budget: int) -> Scores:
    """How each picture's cells look to a memory of the others: (n, D + 2) descriptors with their places, and (n,) what
    the words say of them.

    The core without one picture: what came from it is replaced by the nearest that others have. The bundle's
    own scale counts as one more picture, so that two or three do not say alone how much good parts differ.
    """
    candidates = Candidates.of(rows, told)
    chosen = coreset(candidates.rows, budget)
    core, core_told, core_source = candidates.rows[chosen], candidates.told[chosen], candidates.source[chosen]
    own = OWN_SCALE
    if len(rows) < 2:
        return Scores(
            core, core_told, own.ordinary, own.striking, own.beyond_ordinary, own.beyond_striking, np.zeros(len(rows))
        )
    substitutes, substitutes_told = torch.empty_like(core), torch.empty_like(core_told)
    for number in range(len(rows)):
        mine, others = core_source == number, candidates.source != number
        if bool(mine.any()):
            _, index = nearest(core[mine], candidates.rows[others])
            substitutes[mine], substitutes_told[mine] = candidates.rows[others][index], candidates.told[others][index]
    of_picture = []
    for number, (queries, said) in enumerate(zip(rows, told, strict=True)):
        mine = core_source == number
        distances, index = nearest(queries, torch.cat([core[~mine], substitutes[mine]]))
        beyond = said - torch.cat([core_told[~mine], substitutes_told[mine]])[index]
        of_picture.append([float(one) for one in (distances.median(), distances.max(), beyond.median(), beyond.max())])
    ordinary, striking, beyond_ordinary, beyond_striking = np.median(
        [*of_picture, [own.ordinary, own.striking, own.beyond_ordinary, own.beyond_striking]], axis=0
    ).tolist()
    largest = np.array([figures[1] for figures in of_picture])
    return Scores(core, core_told, ordinary, striking, beyond_ordinary, beyond_striking, largest)


@dataclass(frozen=True)
class Candidates:
    """Descriptors that the core is chosen from, evenly of every picture."""

    rows: Tensor  # (n, D + 2)
    told: Tensor  # (n,)
    source: Tensor  # (n,) the picture that each is from

    @classmethod
    def of(cls, rows: Sequence[Tensor], told: Sequence[Tensor]) -> "Candidates":
        """At most CANDIDATES of all pictures' rows, always the same ones."""
        most = max(CANDIDATES // len(rows), 1)
        generator = torch.Generator().manual_seed(len(rows))
        parts, said = [], []
        for part, words in zip(rows, told, strict=True):
            if len(part) > most:
                kept = torch.randperm(len(part), generator=generator)[:most].to(part.device)
                part, words = part[kept], words[kept]
            parts.append(part)
            said.append(words)
        counts = torch.tensor([len(part) for part in parts])
        source = torch.arange(len(parts)).repeat_interleave(counts).to(parts[0].device)
        return cls(torch.cat(parts), torch.cat(said), source)


def outliers(largest: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the good parts' largest distances stand out, by the rule at `OUTLIER`; none of fewer than five."""
    if len(largest) < FEW:
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
    largest = OWN_SCALE.layout if count < FEW else LEAST_LAYOUT
    if count < 2:
        return largest
    for number in range(count):
        others = torch.cat([layouts[:number], layouts[number + 1 :]])
        alike = torch.einsum("tl,ntl->tn", layouts[number], others).amax(dim=1)
        largest = max(largest, float((1.0 - alike).max()))
    return largest
