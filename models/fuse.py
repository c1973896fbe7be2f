"""The final map: CLIP's map and the last mask's probability on one scale, in the captured frame."""

import torch
from torch import Tensor
from torch.nn import functional

from flawline.config.recipe import FusionSettings
from flawline.models.frames import FrameGeometry


def map_in_frame(maps: Tensor, geometry: FrameGeometry) -> Tensor:
    """(B, S, S) in CLIP's frame -> (B, H, W) float32 in the picture's."""
    size = (geometry.height, geometry.width)
    if maps.shape[-2:] == size:
        return maps.float()
    enlarged = functional.interpolate(maps.float().unsqueeze(1), size, mode="bilinear", align_corners=False)
    return enlarged.squeeze(1)


def region_in_frame(regions: Tensor, geometry: FrameGeometry) -> Tensor:
    """(B, S, S) bool -> (B, H, W) bool: a pixel is in S_a where any pixel of CLIP's frame that it shows is."""
    plane = regions.float().unsqueeze(1)
    size = (geometry.height, geometry.width)
    enlarged = tuple(max(edge, regions.shape[-1]) for edge in size)
    plane = functional.interpolate(plane, enlarged, mode="nearest")
    return functional.adaptive_max_pool2d(plane, size).squeeze(1) > 0


def fuse(located: Tensor, mask_logits: Tensor | None, settings: FusionSettings) -> Tensor:
    """C in [0, 1] and the mask's logits, both (B, H, W), or None where SAM did not run -> A in [0, 1].

    With s the sigmoid of the logits, 0 where SAM did not run. `noisy_or`: A = 1 - (1 - C)(1 - a s), so A = C
    without SAM. `mean`: a C + (1 - a) s. `gate`: C where s >= 0.5, else 0. `mask_only`: s.
    """
    if mask_logits is None:
        match settings.preset:
            case "noisy_or":
                return located.clone()
            case "mean":
                return settings.a * located
            case _:
                return torch.zeros_like(located)
    probability = mask_logits.float().sigmoid()
    match settings.preset:
        case "noisy_or":
            return 1.0 - (1.0 - located) * (1.0 - settings.a * probability)
        case "mean":
            return settings.a * located + (1.0 - settings.a) * probability
        case "gate":
            return located * (mask_logits > 0)
        case _:
            return probability
