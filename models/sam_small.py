"""Small image encoders for SAM: MobileSAM's TinyViT, and EfficientNet-Lite0 with a neck over five strides."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from flawline.models.checkpoints import StateDict
from flawline.models.mixer import Mixer, normed

LITE0 = "efficientnet_lite0"
# EfficientNet-Lite0 was trained on (pixel - 127) / 128
LITE0_MEAN = (127.0, 127.0, 127.0)
LITE0_STD = (128.0, 128.0, 128.0)
LITE0_LEVELS = (0, 1, 2, 3, 4)  # of timm's forward_intermediates: strides 2, 4, 8, 16, 32
LITE0_CHANNELS = (16, 24, 40, 112, 320)
LITE0_STRIDE = 8  # of the image embedding; the published encoders have 16


class Lite0Neck(nn.Module):
    """Trunk features at strides 2 to 32 -> SAM's image embedding at stride 8.

    segment_anything's decoder has nothing that looks from one place of the image to the next, so what belongs
    together must be found here: cheaply at stride 16, where finer levels are folded into channels so that nothing of
    them is averaged away, then at stride 8 with the details, down to those of stride 2: a mask has a place every two
    pixels, and a scratch is hardly wider. The end is that of SAM's own neck.
    """

    def __init__(
        self,
        channels: Sequence[int] = LITE0_CHANNELS,
        out_channels: int = 128,
        coarse_blocks: int = 8,
        fine_blocks: int = 4,
    ) -> None:
        super().__init__()
        finest, finer, fine, coarse, coarsest = channels
        folded = finer * 16 + fine * 4 + coarse + coarsest
        self.reduce = nn.Conv2d(folded, out_channels, kernel_size=1, bias=False)
        self.norm1 = LayerNorm2d(out_channels)
        self.mix = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.coarse = nn.Sequential(*(Mixer(out_channels) for _ in range(coarse_blocks)))
        self.detail = nn.Conv2d(finer * 4 + fine, out_channels, kernel_size=1, bias=False)
        self.finest = nn.Conv2d(finest * 16, out_channels, kernel_size=1, bias=False)
        nn.init.zeros_(self.finest.weight)  # at first it changes nothing
        self.fine = nn.Sequential(*(Mixer(out_channels) for _ in range(fine_blocks)))
        self.norm2 = LayerNorm2d(out_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, 16, 4h, 4w), (B, 24, 2h, 2w), (B, 40, h, w), (B, 112, h/2, w/2), (B, 320, h/4, w/4) -> (B, C, h, w)."""
        stride2, stride4, stride8, stride16, stride32 = features
        stacked = torch.cat(
            [
                functional.pixel_unshuffle(stride4, 4),
                functional.pixel_unshuffle(stride8, 2),
                stride16,
                functional.interpolate(stride32, stride16.shape[-2:], mode="bilinear", align_corners=False),
            ],
            dim=1,
        )
        stacked = stacked.contiguous(memory_format=torch.channels_last)
        coarse = self.coarse(self.mix(normed(self.norm1, self.reduce(stacked))))
        enlarged = functional.interpolate(coarse, stride8.shape[-2:], mode="bilinear", align_corners=False)
        detailed = torch.cat([functional.pixel_unshuffle(stride4, 2), stride8], dim=1)
        details = self.detail(detailed.contiguous(memory_format=torch.channels_last))
        finest = functional.pixel_unshuffle(stride2, 4).contiguous(memory_format=torch.channels_last)
        details = details + self.finest(finest)
        return normed(self.norm2, self.fine(enlarged + details))


class Lite0SamEncoder(nn.Module):
    """EfficientNet-Lite0 as SAM's image encoder: (B, 3, P, P) normalised -> (B, dim, P/8, P/8).

    The input is normalised as the trunk was trained, (pixel - 127) / 128, not with SAM's own numbers.
    `trunk` may be shared with another model (CLIP's image tower); then it must be in eval mode there too. Its stem and
    first `own_stages` stages are copied, so that they can be trained for masks.
    """

    def __init__(
        self, img_size: int = 512, out_channels: int = 128, trunk: nn.Module | None = None, own_stages: int = 0
    ) -> None:
        super().__init__()
        self.img_size = img_size  # segment_anything's SamPredictor asks for it by this name
        self.trunk: Any = trunk if trunk is not None else timm.create_model(LITE0, num_classes=0)
        if own_stages and trunk is not None:
            self.trunk = copy.deepcopy(trunk)
            shared = list(cast(Any, trunk).blocks.children())[own_stages:]
            self.trunk.blocks = nn.Sequential(*list(self.trunk.blocks.children())[:own_stages], *shared)
        self.neck = Lite0Neck(LITE0_CHANNELS, out_channels)

    def trunk_features(self, normalised: Tensor) -> list[Tensor]:
        """(B, 3, P, P) -> the trunk's features at strides 2, 4, 8, 16, 32."""
        return list(
            self.trunk.forward_intermediates(
                normalised, indices=list(LITE0_LEVELS), stop_early=True, intermediates_only=True
            )
        )

    def forward(self, normalised: Tensor) -> Tensor:
        embedding: Tensor = self.neck(self.trunk_features(normalised))
        return embedding


class TinyVitSamEncoder(nn.Module):
    """MobileSAM's image encoder on timm's TinyViT-5M: (B, 3, P, P) normalised -> (B, dim, P/16, P/16).

    MobileSAM leaves out the stride of the last patch merging, so that the grid stays at stride 16.
    """

    def __init__(self, img_size: int = 1024, out_channels: int = 256) -> None:
        super().__init__()
        self.img_size = img_size
        self.trunk: Any = timm.create_model("tiny_vit_5m_224", num_classes=0)
        self.trunk.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.trunk.head = nn.Identity()  # the classifier's norm is not part of MobileSAM
        channels = self.trunk.num_features
        self.neck = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )

    def forward(self, normalised: Tensor) -> Tensor:
        embedding: Tensor = self.neck(self.trunk.forward_features(normalised))
        return embedding


def tiny_vit_names(state: StateDict) -> StateDict:
    """MobileSAM's tensor names -> those of `TinyVitSamEncoder`; the unused classifier is dropped.

    MobileSAM counts a patch merging to the stage before it, timm to the stage after it.
    """
    renamed: StateDict = {}
    prefix = "image_encoder."
    for name, tensor in state.items():
        if not name.startswith(prefix) or name.startswith((prefix + "neck.", prefix + "trunk.")):
            renamed[name] = tensor
            continue
        parts = name.removeprefix(prefix).split(".")
        if parts[0] in ("norm_head", "head") or parts[-1] == "attention_bias_idxs":
            continue
        if parts[0] == "patch_embed":  # patch_embed.seq.0.c.weight
            parts[1:3] = ["conv1" if parts[2] == "0" else "conv2"]
        elif parts[0] == "layers":  # layers.0.blocks.1.conv1.bn.weight, layers.0.downsample.conv1.c.weight
            stage = int(parts[1]) + (parts[2] == "downsample")
            parts[:2] = ["stages", str(stage)]
        parts = ["conv" if part == "c" else part for part in parts]
        renamed[".".join([prefix + "trunk", *parts])] = tensor
    return renamed
