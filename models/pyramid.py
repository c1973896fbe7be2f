"""The embedded bundle's image trunk: EfficientNet-Lite0 under a small feature pyramid, as a timm model.

Registered as `flawline_lite0`, so that open_clip builds it like any other timm tower. A convolution sees
little of the picture at fine strides; the pyramid tells each place what its picture is like elsewhere, which
is what "unlike the rest" needs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional

from flawline.models.mixer import Mixer

BACKBONE = "efficientnet_lite0"
LEVELS = (2, 3, 4)  # of the backbone's feature levels: strides 8, 16, 32
CHANNELS = (40, 112, 320)
WIDTH = 64
BLOCKS = (4, 6, 2)  # ConvNeXt blocks at these strides
NEIGHBOURS = 4  # of the places most alike elsewhere in the picture
MEMORY_LEVELS = (3, 4)  # numbers of the backbone's own features at strides 8 and 16, after the pyramid's levels


class Lite0Pyramid(nn.Module):
    """(B, 3, S, S) normalised -> pyramid features at strides 8, 16, 32, and the pooled backbone feature."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = timm.create_model(BACKBONE, num_classes=0)
        self.laterals = nn.ModuleList(Lateral(channels) for channels in CHANNELS)
        self.smooth = nn.ModuleList(Smooth() for _ in CHANNELS)
        self.deepen = nn.ModuleList(nn.Sequential(*(Mixer(WIDTH) for _ in range(count))) for count in BLOCKS)
        self.num_features = int(self.backbone.head_hidden_size)
        self.feature_info = [{"num_chs": WIDTH, "reduction": stride} for stride in (8, 16, 32)]
        self.default_cfg: dict[str, Any] = {"pool_size": (7, 7)}
        self.memory_levels = MEMORY_LEVELS
        self.level_channels = (*[WIDTH] * len(CHANNELS), *CHANNELS)  # of `forward_intermediates`

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """There is no classifier; open_clip asks for its removal."""

    def backbone_features(self, normalised: Tensor) -> list[Tensor]:
        """The backbone's features at strides 8, 16, 32."""
        return list(
            self.backbone.forward_intermediates(
                normalised, indices=list(LEVELS), stop_early=True, intermediates_only=True
            )
        )

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Backbone features at strides 8, 16, 32 -> (B, 64, h, w) at the same strides, finest first."""
        unlike = novelty(features[0], features[1])
        levels: list[Tensor] = []
        above: Tensor | None = None
        for lateral, smooth, deepen, level in zip(
            reversed(self.laterals), reversed(self.smooth), reversed(self.deepen), reversed(features), strict=True
        ):
            size = level.shape[-2:]
            seen = functional.interpolate(unlike, size, mode="bilinear", align_corners=False)
            own = lateral(level, seen)
            if above is not None:
                own = own + functional.interpolate(above, size, mode="bilinear", align_corners=False)
            above = deepen(smooth(own))
            levels.append(above)
        return levels[::-1]

    def forward_intermediates(
        self,
        normalised: Tensor,
        indices: Sequence[int] = (0, 1, 2),
        intermediates_only: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
    ) -> Any:
        """Levels by number, and the backbone's last features before them unless only these are asked.

        0 to 2 are the pyramid's, 3 to 5 the backbone's own at the same strides, which cost nothing more.
        """
        features = self.backbone_features(normalised)
        levels = [*self.pyramid(features), *features]
        chosen = [levels[index] for index in indices]
        if intermediates_only:
            return chosen
        last: Tensor = self.backbone.bn2(self.backbone.conv_head(features[-1]))
        return last, chosen

    def forward_head(self, last: Tensor) -> Tensor:
        """(B, 1280, h, w) -> (B, 1280)."""
        return last.mean(dim=(2, 3))

    def forward(self, normalised: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1280)."""
        features: Tensor = self.backbone.forward_features(normalised)
        return self.forward_head(features)


class Lateral(nn.Module):
    """One backbone level on its way into the pyramid: as it is, and as it stands out from its own picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.plain = nn.Conv2d(channels, WIDTH, kernel_size=1)
        self.relative = nn.Conv2d(channels, WIDTH, kernel_size=1, bias=False)
        self.novel = nn.Conv2d(1, WIDTH, kernel_size=1, bias=False)
        self.norm = nn.GroupNorm(8, WIDTH)

    def forward(self, level: Tensor, unlike: Tensor) -> Tensor:
        """(B, C, h, w), (B, 1, h, w) -> (B, 64, h, w)."""
        outstanding = functional.instance_norm(level)
        mixed: Tensor = self.norm(self.plain(level) + self.relative(outstanding) + self.novel(unlike))
        return mixed


class Smooth(nn.Module):
    """Two 3 x 3 convolutions with a way around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64, h, w) -> the same."""
        smoothed: Tensor = x + self.second(functional.relu(self.first(functional.relu(x))))
        return smoothed


def novelty(fine: Tensor, middle: Tensor) -> Tensor:
    """How unlike everything else in its picture a place is: features at strides 8 and 16 -> (B, 1, h, w).

    One minus the mean cosine with the NEIGHBOURS most alike places outside its own 3 x 3 cells, times ten;
    about 0 for texture that repeats.
    """
    size = middle.shape[-2:]
    joined = torch.cat(
        [functional.instance_norm(functional.avg_pool2d(fine, 2)), functional.instance_norm(middle)], dim=1
    )
    pooled = functional.avg_pool2d(joined, 3, stride=1, padding=1, count_include_pad=False)
    tokens = functional.normalize(pooled.flatten(2), dim=1)  # (B, C, n)
    alike = tokens.transpose(1, 2) @ tokens  # (B, n, n)
    alike = alike.masked_fill(_nearby(int(size[0]), int(size[1]), alike.device), -1.0)
    best = alike.topk(NEIGHBOURS, dim=-1).values.mean(dim=-1)
    unlike: Tensor = (10.0 * (1.0 - best)).view(-1, 1, *size)
    return unlike


@cache
@torch.inference_mode(False)  # a training may come upon it later
def _nearby(height: int, width: int, device: torch.device) -> Tensor:
    """(n, n) bool: cells that touch one another, or are the same. Made once for each size of a picture."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    near_rows = (rows[:, None] - rows[None, :]).abs() <= 1
    return near_rows & ((columns[:, None] - columns[None, :]).abs() <= 1)


@register_model  # type: ignore[untyped-decorator]
def flawline_lite0(pretrained: bool = False, **_: Any) -> Lite0Pyramid:
    """timm's entry: weights come from the bundle, never from here."""
    return Lite0Pyramid()
