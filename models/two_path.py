"""CLIP's image tower with a second path beside its own: attention of values to values (CLIP Surgery).

The second path is dense: each place gathers what has the same values, and no MLP mixes it. SDP and AnomalyCLIP read
their maps from it. Works on open_clip's own ViT.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import BundleError

STAGES = 4


@dataclass(frozen=True)
class Stage:
    """Tokens after one stage, (B, 1 + n, width), the class token first."""

    plain: Tensor  # the tower's own path
    dense: Tensor  # the second path


def check_tower(visual: Any, where: str) -> None:
    """Raises BundleError, beginning with `where`, for a tower that has no such second path."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", ())
    plain = bool(blocks) and all(
        isinstance(getattr(block, "attn", None), torch.nn.MultiheadAttention) for block in blocks
    )
    if not plain or not hasattr(visual, "class_embedding") or visual.proj is None or visual.attn_pool is not None:
        raise BundleError(f"{where}: needs a CLIP with open_clip's ViT image tower and a class token")


def staged(visual: Any, normalised: Tensor) -> list[Stage]:
    """(B, 3, S, S) -> four stages of equal depth, as CLIP-AD has them.

    The second path begins anew in every stage: it is the sum of what the stage's blocks gather. As in the published
    code, whose sum is taken in place, `plain` of all stages but the last also holds what the attention of the block
    after it adds; released layers were trained on that.
    """
    tokens = visual._embeds(normalised)
    dense = torch.zeros_like(tokens)
    stages: list[Stage] = []
    blocks = visual.transformer.resblocks
    depth = len(blocks) // STAGES
    for number, block in enumerate(blocks):
        own, gathered = _attend(block, tokens)
        begins = number % depth == 0
        if begins and stages:
            stages[-1] = Stage(tokens + own, stages[-1].dense)
        dense = gathered if begins else dense + gathered
        tokens = _mlp(block, tokens + own)
        if (number + 1) % depth == 0 and len(stages) < STAGES:
            stages.append(Stage(tokens, dense))
    return stages


def summed(visual: Any, normalised: Tensor, blocks_with: int) -> Tensor:
    """(B, 3, S, S) -> (B, 1 + n, width): the second path over the last `blocks_with` blocks, as AnomalyCLIP has it.

    It begins with the tokens before the first of them.
    """
    tokens = visual._embeds(normalised)
    blocks = visual.transformer.resblocks
    first = max(len(blocks) - blocks_with, 0)
    dense: Tensor = tokens
    for number, block in enumerate(blocks):
        if number == first:
            dense = tokens
        own, gathered = _attend(block, tokens)
        if number >= first:
            dense = dense + gathered
        tokens = _mlp(block, tokens + own)
    return dense


def joint(visual: Any, tokens: Tensor) -> Tensor:
    """Tokens -> unit vectors in the joint space, through the final norm and the projection."""
    projected: Tensor = visual.ln_post(tokens) @ visual.proj
    unit: Tensor = functional.normalize(projected, dim=-1)
    return unit


def _attend(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the block's attention adds, and what it would with values in place of queries and keys."""
    attention = block.attn
    normed = block.ln_1(tokens)
    batch, count, width = normed.shape
    parts = functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (
        part.view(batch, count, attention.num_heads, -1).transpose(1, 2) for part in parts.chunk(3, dim=-1)
    )
    both = [functional.scaled_dot_product_attention(*three) for three in ((query, key, value), (value, value, value))]
    own, gathered = (attention.out_proj(one.transpose(1, 2).reshape(batch, count, width)) for one in both)
    added: Tensor = block.ls_1(own)
    return added, gathered


def _mlp(block: Any, tokens: Tensor) -> Tensor:
    added: Tensor = block.ls_2(block.mlp(block.ln_2(tokens)))
    return tokens + added
