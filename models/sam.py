"""SAM as segment_anything's own modules: the published sizes, MobileSAM, and a small one on CLIP's trunk."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torch.nn import functional

from flawline.config.errors import BundleError
from flawline.models.bundle import SamSettings
from flawline.models.checkpoints import StateDict, load_weights, read_state_dict
from flawline.models.sam_small import (
    LITE0_MEAN,
    LITE0_STD,
    LITE0_STRIDE,
    Lite0SamEncoder,
    TinyVitSamEncoder,
    tiny_vit_names,
)

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)
TRUNK = "image_encoder.trunk."
PATCH = 16  # px of the frame per place of the published encoders' embedding


@dataclass(frozen=True)
class VitSize:
    """One of SAM's published image encoders."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]  # blocks with attention over the whole grid, counted from 0


VIT_SIZES = {
    "vit_h": VitSize(1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": VitSize(1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": VitSize(768, 12, 12, (2, 5, 8, 11)),
}


def build_sam(settings: SamSettings, trunk: nn.Module | None = None) -> Any:
    """segment_anything's `Sam` for these settings, in eval mode, weights not loaded.

    `trunk` is CLIP's image trunk where `trunk_from_clip` says that the encoder shares it.
    """
    decoder = settings.decoder
    small = settings.architecture == "lite0"
    grid = settings.input_size // (LITE0_STRIDE if small else PATCH)
    sam = Sam(
        image_encoder=_image_encoder(settings, trunk),
        prompt_encoder=PromptEncoder(
            embed_dim=decoder.dim,
            image_embedding_size=(grid, grid),
            input_image_size=(settings.input_size, settings.input_size),
            mask_in_chans=decoder.mask_channels,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=decoder.depth,
                embedding_dim=decoder.dim,
                mlp_dim=decoder.mlp_dim,
                num_heads=decoder.heads,
            ),
            transformer_dim=decoder.dim,
            iou_head_depth=decoder.iou_depth,
            iou_head_hidden_dim=decoder.iou_hidden,
        ),
        pixel_mean=list(settings.mean or (LITE0_MEAN if small else SAM_MEAN)),
        pixel_std=list(settings.std or (LITE0_STD if small else SAM_STD)),
    )
    return sam.eval().requires_grad_(False)


def load_sam(sam: Any, settings: SamSettings, checkpoint: Path) -> None:
    """Load a published SAM checkpoint into `sam`. Raises BundleError naming the file.

    Position embeddings made for SAM's 1024 px frame are brought to this bundle's input size. A trunk
    shared with CLIP, or what of it is, is not in the file; it is loaded with CLIP.
    """
    state = read_state_dict(checkpoint)
    if settings.architecture == "vit_t":
        state = tiny_vit_names(state)
    if settings.architecture in VIT_SIZES:
        _resize_positions(state, sam.state_dict())
    if settings.trunk_from_clip:
        if any(_is_clips(name, settings) for name in state):
            raise BundleError(f"{checkpoint}: holds a trunk, but sam.trunk_from_clip takes CLIP's")
        state |= {name: tensor for name, tensor in sam.state_dict().items() if _is_clips(name, settings)}
    load_weights(sam, state, checkpoint)


def own_state(sam: Any, settings: SamSettings) -> StateDict:
    """What a bundle stores of this SAM: everything but what of the trunk is stored with CLIP."""
    state: StateDict = sam.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if not _is_clips(name, settings)}


def _is_clips(name: str, settings: SamSettings) -> bool:
    """Whether a tensor of SAM's is stored with CLIP."""
    if not (settings.trunk_from_clip and name.startswith(TRUNK)):
        return False
    part, _, rest = name.removeprefix(TRUNK).partition(".")
    own = int(rest.partition(".")[0]) < settings.own_stages if part == "blocks" else part in ("conv_stem", "bn1")
    return not (own and settings.own_stages)


def _image_encoder(settings: SamSettings, trunk: nn.Module | None) -> nn.Module:
    if settings.architecture == "lite0":
        if settings.trunk_from_clip and trunk is None:
            raise BundleError("sam.trunk_from_clip needs a CLIP whose image tower has a timm trunk")
        shared = getattr(trunk, "backbone", trunk) if settings.trunk_from_clip else None
        return Lite0SamEncoder(settings.input_size, settings.decoder.dim, shared, settings.own_stages)
    if settings.architecture == "vit_t":
        return TinyVitSamEncoder(settings.input_size, settings.decoder.dim)
    size = VIT_SIZES[settings.architecture]
    encoder: nn.Module = ImageEncoderViT(
        img_size=settings.input_size,
        patch_size=PATCH,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=4,
        out_chans=settings.decoder.dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=size.global_blocks,
    )
    return encoder


def _resize_positions(state: StateDict, own: StateDict) -> None:
    """Bring absolute and relative position embeddings to the sizes of `own`, in place."""
    for name, target in own.items():
        source = state.get(name)
        if source is None or source.shape == target.shape:
            continue
        if name.endswith("pos_embed"):  # (1, h, w, C)
            grid = source.float().permute(0, 3, 1, 2)
            size = tuple(target.shape[1:3])
            resized = functional.interpolate(grid, size, mode="bicubic", antialias=True, align_corners=False)
            state[name] = resized.permute(0, 2, 3, 1)
        elif ".rel_pos_" in name:  # (2n - 1, C), as segment_anything itself would at run time
            line = source.float().t().unsqueeze(0)
            state[name] = functional.interpolate(line, target.shape[0], mode="linear")[0].t()
