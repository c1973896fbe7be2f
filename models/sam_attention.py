"""SAM's ViT blocks with their attention through `scaled_dot_product_attention`, equal to segment_anything's forward.

segment_anything adds q·Rh[y_q, y_k] + q·Rw[x_q, x_k] to the logits, a bias of (h w) x (h w) for every head: at
1024 px 4096 x 4096, several times over. Two other ways to the same numbers:

`mask`: the bias is made for a few rows of queries at a time and handed over as the attention's mask.
`extended`: no bias at all. The logits are the inner product of [q, q·Rh[y_q] / s, q·Rw[x_q] / s] with
[k, onehot(y_k), onehot(x_k)], times s = d^-1/2; so a kernel that knows no bias serves, with d + h + w channels.

Windows are cut after the projection to queries, keys and values instead of before it: the places that
segment_anything pads with zeros have these layers' biases there, so nothing is computed for them.
"""

from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import Tensor, nn
from torch.nn import functional

QUERIES_AT_ONCE = 256
"""For `mask` on a CPU: their bias stays in the processor's cache."""


class FusedBlock(nn.Module):
    """One of segment_anything's blocks, with its own layers under its own names: (B, h, w, C) -> (B, h, w, C).

    `grid` is that of the whole embedding. `how` is `mask` or `extended`. Make it when the weights are loaded.
    """

    def __init__(self, block: Any, grid: tuple[int, int], how: str) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window = int(block.window_size)
        self.how = how
        rows, columns = (self.window, self.window) if self.window else grid
        rel_rows, rel_columns = self.attn.rel_pos_h, self.attn.rel_pos_w
        factor = 1.0 / self.attn.scale if how == "extended" else 1.0
        self.by_row: Tensor  # (h, h, d): of a query's row, of a key's row
        self.by_column: Tensor  # (w, w, d)
        self.register_buffer("by_row", get_rel_pos(rows, rows, rel_rows) * factor, persistent=False)
        self.register_buffer("by_column", get_rel_pos(columns, columns, rel_columns) * factor, persistent=False)
        row, column = torch.eye(rows).repeat_interleave(columns, 0), torch.eye(columns).repeat(rows, 1)
        self.place: Tensor  # (h w, h + w): which row and which column a key is in
        self.register_buffer("place", torch.cat([row, column], 1).to(rel_rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """As segment_anything's `Block`."""
        x = x + self.attn.proj(self._attend(self.attn.qkv(self.norm1(x))))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _attend(self, qkv: Tensor) -> Tensor:
        """(B, h, w, 3 C) -> (B, h, w, C), not yet projected."""
        if not self.window:
            return self._attention(qkv)
        batch, height, width, channels = qkv.shape
        down, across = -(-height // self.window), -(-width // self.window)
        padded = (down * self.window, across * self.window)
        if padded != (height, width):
            whole = self.attn.qkv.bias.expand(batch, *padded, -1).clone()
            whole[:, :height, :width] = qkv
            qkv = whole
        cut = qkv.view(batch, down, self.window, across, self.window, channels).transpose(2, 3)
        mixed = self._attention(cut.reshape(-1, self.window, self.window, channels))
        joined = mixed.view(batch, down, across, self.window, self.window, -1).transpose(2, 3)
        return joined.reshape(batch, *padded, -1)[:, :height, :width]

    def _attention(self, qkv: Tensor) -> Tensor:
        """(N, h, w, 3 C) -> (N, h, w, C): each of the N grids attends to itself."""
        number, height, width, _ = qkv.shape
        heads = self.attn.num_heads
        q, k, v = qkv.view(number, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (N, heads, h w, d)
        placed = q.unflatten(2, (height, width))
        by_row = torch.einsum("nayxd,ykd->nayxk", placed, self.by_row).flatten(2, 3)  # (N, heads, h w, h)
        by_column = torch.einsum("nayxd,xkd->nayxk", placed, self.by_column).flatten(2, 3)  # (N, heads, h w, w)
        attend = self._extended if self.how == "extended" else self._masked
        mixed = attend(q, k, v, by_row, by_column)
        return mixed.transpose(1, 2).reshape(number, height, width, -1)

    def _extended(self, q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        more = self.place.shape[1]
        q = torch.cat([q, by_row, by_column], dim=3)
        k = torch.cat([k, self.place.expand(*k.shape[:2], -1, -1)], dim=3)
        # the flash kernels want values as wide as keys
        mixed = functional.scaled_dot_product_attention(q, k, functional.pad(v, (0, more)), scale=self.attn.scale)
        return mixed[..., : v.shape[3]]

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        queries = q.shape[2]
        # On a GPU all at once, which is one kernel; elsewhere the bias is the larger part of the memory's traffic.
        step = queries if q.device.type == "cuda" or queries <= QUERIES_AT_ONCE else QUERIES_AT_ONCE
        parts = []
        for start in range(0, queries, step):
            part = slice(start, start + step)
            bias = (by_row[:, :, part, :, None] + by_column[:, :, part, None, :]).flatten(3)
            parts.append(functional.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def fuse_attention(encoder: nn.Module, how: str) -> bool:
    """Replace the blocks of segment_anything's image encoder, in place. `how`: plain, mask, extended or auto.

    `auto` is `mask` on a CPU and in float32, for which there is no flash kernel, else `extended`. False where
    nothing is replaced: the encoder is another one, or `plain` was asked for.
    """
    if how == "plain" or not isinstance(encoder, ImageEncoderViT):
        return False
    weight = encoder.patch_embed.proj.weight
    if how == "auto":
        how = "extended" if weight.device.type == "cuda" and weight.dtype != torch.float32 else "mask"
    grid = (encoder.img_size // weight.shape[2], encoder.img_size // weight.shape[3])
    for number, block in enumerate(encoder.blocks):
        encoder.blocks[number] = FusedBlock(block, grid, how)
    return True
