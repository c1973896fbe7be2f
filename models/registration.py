"""How far a part has shifted against the good parts, in cells and fractions of one, from features that are there.

The picture's features are laid over those of one good part, at every shift by whole cells; the shift at which they
are most alike counts, refined by a parabola through its neighbours. Nothing is moved but the place in the frame that
a memory compares, so the picture is judged as it was taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

REACH = 0.25  # of the grid's edge: no part is looked for farther away
CHANNELS = 16  # directions in which the good part's cells differ most
ADVANTAGE = 0.02
"""A part has shifted where that makes it more alike than lying still by this much, as a correlation."""


@dataclass(frozen=True)
class Registration:
    """One good part that others are laid over."""

    directions: Tensor  # (C, D) float32
    reference: Tensor  # (C, h, w) float32, every channel's mean is zero

    @classmethod
    def of(cls, cells: Tensor) -> "Registration":
        """(D, h, w) descriptors of the good part."""
        flat = cells.flatten(1).double()
        flat = flat - flat.mean(dim=1, keepdim=True)
        principal = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -CHANNELS:].T.float()
        # as they are stored, so that a memory that was read shifts parts as the one that was learnt
        directions = principal.half().float()
        return cls(directions, _projected(cells[None].float(), directions)[0].half().float())

    def shifts(self, cells: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, 2) float32: how far the part lies below and to the right of the good one, in cells.

        Nothing is read on the host.
        """
        seen = _projected(cells.float(), self.directions)
        height, width = seen.shape[-2:]
        rows, columns = int(REACH * height), int(REACH * width)
        margin = (columns, columns, rows, rows)
        energy = seen.square().sum(dim=1, keepdim=True)
        mine = self.reference.square().sum(dim=0)[None, None]
        inside = functional.pad(torch.ones_like(energy), margin)
        alike = functional.conv2d(functional.pad(seen, margin), self.reference[None])[:, 0]
        # only what both have counts
        theirs = functional.conv2d(functional.pad(energy, margin), torch.ones_like(mine))[:, 0]
        ours = functional.conv2d(inside, mine)[:, 0]
        score = alike / (theirs * ours).clamp_min(1e-12).sqrt()  # (B, 2 rows + 1, 2 columns + 1)
        largest, place = score.flatten(1).max(dim=1)
        y, x = place // score.shape[2], place % score.shape[2]
        found = torch.stack(
            [_peak(score, y, x, 1) + y - rows, _peak(score, y, x, 2) + x - columns],
            dim=1,
        )
        moved = largest > score[:, rows, columns] + ADVANTAGE
        return torch.where(moved[:, None], found, torch.zeros_like(found))


def _projected(cells: Tensor, directions: Tensor) -> Tensor:
    """(B, D, h, w), (C, D) -> (B, C, h, w), every channel's mean over the picture zero."""
    seen = torch.einsum("cd,bdhw->bchw", directions, cells)
    return seen - seen.mean(dim=(2, 3), keepdim=True)


def _peak(score: Tensor, y: Tensor, x: Tensor, axis: int) -> Tensor:
    """(B,): where between its neighbours along an axis the largest score lies, in cells; 0 at the edge."""
    batch = torch.arange(len(score), device=score.device)
    last = score.shape[axis] - 1
    place = y if axis == 1 else x

    def at(step: int) -> Tensor:
        moved = (place + step).clamp(0, last)
        return score[batch, moved, x] if axis == 1 else score[batch, y, moved]

    before, here, after = at(-1), at(0), at(1)
    offset = 0.5 * (before - after) / (before - 2.0 * here + after).clamp_max(-1e-6)
    return torch.where((place > 0) & (place < last), offset.clamp(-0.5, 0.5), torch.zeros_like(offset))
