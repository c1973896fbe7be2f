"""What a memory of good parts sees of a picture: a descriptor for every cell of a grid, and one of the whole layout.

The features are those that CLIP's image tower computes anyway. As in PatchCore (Roth et al. 2022, section 3.1)
each is averaged over its 3 x 3 neighbours, so that a part may shift a little.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional

MOST_CHANNELS = 256  # wider descriptors are projected
LAYOUT_GRID = 4


def joined(levels: Sequence[Tensor]) -> Tensor:
    """Levels (B, C_i, h_i, w_i), finest first -> (B, sum C_i, h, w) float32 at the middle level's grid.

    Every level is a unit vector at every place before it is joined, so none drowns the others; so is the whole.
    """
    height, width = levels[len(levels) // 2].shape[-2:]
    size = (int(height), int(width))
    parts = []
    for level in levels:
        smooth = functional.avg_pool2d(level.float(), 3, stride=1, padding=1, count_include_pad=False)
        if smooth.shape[-1] > size[-1]:
            smooth = functional.adaptive_avg_pool2d(smooth, size)
        elif smooth.shape[-1] < size[-1]:
            smooth = functional.interpolate(smooth, size, mode="bilinear", align_corners=False)
        parts.append(functional.normalize(smooth, dim=1))
    return torch.cat(parts, dim=1) / sqrt(len(parts))


def projection(channels: int) -> Tensor | None:
    """(MOST_CHANNELS, channels) random orthonormal rows, always the same ones; None where none is needed.

    Random directions keep cosines nearly as they are (Johnson and Lindenstrauss). The memory's file holds them.
    """
    if channels <= MOST_CHANNELS:
        return None
    generator = torch.Generator().manual_seed(channels)
    square = torch.randn(channels, MOST_CHANNELS, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(square).Q.T
    return rows.to(torch.float16).float().contiguous()


def descriptors(levels: Sequence[Tensor], projected: Tensor | None) -> Tensor:
    """Levels of B tiles -> (B, D, h, w) float32 unit vectors."""
    plain = joined(levels)
    if projected is None:
        return plain
    return functional.normalize(torch.einsum("dc,bchw->bdhw", projected, plain), dim=1)


def layout(cells: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, 16 D) unit vectors: what lies where, coarsely, less what all places share."""
    coarse = functional.adaptive_avg_pool2d(cells, LAYOUT_GRID)
    return functional.normalize((coarse - coarse.mean(dim=(2, 3), keepdim=True)).flatten(1), dim=1)
