"""The losses that CLIP's linear layers are trained with: focal and dice, as APRIL-GAN has them."""

import torch
from torch import Tensor

SMOOTH = 1e-5
GAMMA = 2.0


def focal_loss(abnormal: Tensor, truth: Tensor) -> Tensor:
    """P(abnormal) and truth in {0, 1}, both (B, H, W) -> scalar.

    With the one-hot truth kept within [1e-5, 1 - 1e-5] and p = sum of truth times probability + 1e-5:
    the mean over pixels of -(1 - p)^2 log p.
    """
    hot = truth.float().clamp(SMOOTH, 1.0 - SMOOTH)
    p = hot * abnormal + (1.0 - hot) * (1.0 - abnormal) + SMOOTH
    return (-((1.0 - p) ** GAMMA) * p.log()).mean()


def dice_loss(abnormal: Tensor, truth: Tensor) -> Tensor:
    """P(abnormal) p and truth g in {0, 1}, both (B, H, W) -> scalar.

    1 - the mean over pictures of (2 sum p g + 1) / (sum p + sum g + 1).
    """
    p, g = abnormal.flatten(1), truth.float().flatten(1)
    overlap = (2.0 * (p * g).sum(1) + 1.0) / (p.sum(1) + g.sum(1) + 1.0)
    return 1.0 - overlap.mean()


def adapter_loss(maps: list[Tensor], truth: Tensor) -> Tensor:
    """One map P(abnormal) (B, H, W) per tap -> the sum over taps of focal and dice."""
    return torch.stack([focal_loss(one, truth) + dice_loss(one, truth) for one in maps]).sum()
