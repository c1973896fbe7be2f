"""Losses: focal and dice as the paper's set-up has them (APRIL-GAN), balanced ones to start from, CLIP's own."""

import torch
from torch import Tensor
from torch.nn import functional


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


def balanced_loss(abnormal: Tensor, truth: Tensor, smooth: float = 1e-4) -> Tensor:
    """Mean cross-entropy of the defective pixels and mean cross-entropy of the good ones, half each, over a batch.

    Where defects are a thousandth of the pixels, focal and dice alone leave a tower that is still learning at
    "nothing anywhere", from where no gradient leads away.
    """
    defective = -(abnormal + smooth).log() * truth
    good = -(1.0 - abnormal + smooth).log() * (1.0 - truth)
    return 0.5 * defective.sum() / truth.sum().clamp_min(1.0) + 0.5 * good.sum() / (1.0 - truth).sum()


def published_loss(abnormal: Tensor, truth: Tensor) -> Tensor:
    """Focal + dice over all pictures, as published."""
    return focal_loss(abnormal, truth) + dice_loss(abnormal, truth)


def finishing_loss(abnormal: Tensor, truth: Tensor) -> Tensor:
    """As published, and a quarter of the balanced cross-entropy.

    The former bring the map to the scale of real shares; the latter keeps faint and unusual defects in it.
    """
    return published_loss(abnormal, truth) + 0.25 * balanced_loss(abnormal, truth)


def segmentation_loss(abnormal: Tensor, truth: Tensor) -> Tensor:
    """Balanced cross-entropy + focal, and dice over the pictures that have a defect."""
    loss = balanced_loss(abnormal, truth) + focal_loss(abnormal, truth)
    bad = truth.flatten(1).amax(dim=1) > 0.5
    return loss + dice_loss(abnormal[bad], truth[bad]) if bool(bad.any()) else loss


def striking_loss(abnormal: Tensor, truth: Tensor, smooth: float = 1e-4) -> Tensor:
    """Cross-entropy of each picture's most striking good places and of its defects' most striking place, half each.

    A picture is judged by its map's maximum: this is the loss of what decides, where the others are of all pixels.
    Good is what lies more than four places from any defect; of it the most striking thousandth counts.
    """
    near = functional.max_pool2d(truth.unsqueeze(1), 9, 1, 4).squeeze(1) > 0.0
    good = abnormal.masked_fill(near, 0.0).flatten(1)
    false = -(1.0 - good.topk(max(1, good.shape[1] // 1000), dim=1).values + smooth).log().mean()
    found = abnormal.masked_fill(truth < 0.5, 0.0).flatten(1).amax(dim=1)
    bad = truth.flatten(1).amax(dim=1) >= 0.5
    return 0.5 * false - 0.5 * ((found + smooth).log() * bad).sum() / bad.sum().clamp_min(1)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's: both (B, D) unit vectors in pairs; cross-entropy both ways."""
    logits = scale * images @ texts.T
    pairs = torch.arange(len(images), device=images.device)
    both = functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)
    return both / 2
