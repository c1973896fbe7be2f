"""Focal and dice loss, as the paper's training set-up has them (APRIL-GAN)."""

import torch
from torch import Tensor


def focal_loss(abnormal: Tensor, truth: Tensor, gamma: float = 2.0, smooth: float = 1e-5) -> Tensor:
    """P(abnormal) and truth 0 or 1, both (B, H, W) -> mean of -(1 - p)^gamma log p, p that of the true class."""
    target = truth.clamp(smooth, 1.0 - smooth)
    p = target * abnormal + (1.0 - target) * (1.0 - abnormal) + smooth
    return (-((1.0 - p).clamp_min(0.0) ** gamma) * p.log()).mean()


def dice_loss(abnormal: Tensor, truth: Tensor) -> Tensor:
    """1 - the mean over pictures of (2 sum(p g) + 1) / (sum p + sum g + 1)."""
    p, g = abnormal.flatten(1), truth.flatten(1)
    overlap = (2.0 * (p * g).sum(dim=1) + 1.0) / (p.sum(dim=1) + g.sum(dim=1) + 1.0)
    return 1.0 - overlap.mean()


def segmentation_loss(abnormal: Tensor, truth: Tensor) -> Tensor:
    """Focal + dice of one map."""
    return focal_loss(abnormal, truth) + dice_loss(abnormal, truth)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's: both (B, D) unit vectors in pairs; cross-entropy both ways."""
    logits = scale * images @ texts.T
    pairs = torch.arange(len(images), device=images.device)
    both = torch.nn.functional.cross_entropy(logits, pairs) + torch.nn.functional.cross_entropy(logits.T, pairs)
    return both / 2
