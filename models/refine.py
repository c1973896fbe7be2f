"""Cascaded Prompts for SAM (CPS): points, then points and logits, then points, box and logits (section 3.2).

segment_anything's prompt encoder selects by `nonzero`, which waits for the device, and its mask decoder
takes one image at a time. Here its modules and weights run in a batched forward that is equal to it.
Absent prompts are hidden as keys of the transformer's attention: a token that nobody attends to is the
same as a token that is not there, so all numbers of points share one static shape.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flawline.config.recipe import CascadeSettings
from flawline.models.frames import FrameGeometry
from flawline.models.prompt import PointPrompts


@dataclass(frozen=True)
class Level:
    """One level of the cascade for B frames (equations 9, 10, 12)."""

    logits: Tensor  # (B, 4h, 4w) float32, raw low-resolution logits of the chosen mask
    score: Tensor  # (B,) the decoder's own estimate of the mask's IoU
    index: Tensor  # (B,) int64, which of the masks was chosen, 0 to 2
    geometry: FrameGeometry

    @cached_property
    def frame_logits(self) -> Tensor:
        """(B, H, W) float32 in the captured frame; above zero is the mask. Made when first asked for."""
        return to_frame(self.logits, self.geometry)


@dataclass(frozen=True)
class Cascade:
    """What the cascade did: one to three levels, and the box of the last one."""

    levels: list[Level]
    box: Tensor | None  # (B, 4) float32 x0, y0, x1, y1 in pixels of the captured frame; None below level 3
    box_present: Tensor | None  # (B,) bool; False where the second level's mask was empty


class MaskRefiner:
    """segment_anything's prompt encoder and mask decoder over a batch of frames.

    Make it when `sam` is on its device. It works in the precision the modules have at each call; make it
    before `sam` is cast to half precision, so that positions keep their full one.
    """

    def __init__(self, sam: Any) -> None:
        self._prompt: Any = sam.prompt_encoder
        self._decoder: Any = sam.mask_decoder
        self._frequencies = self._prompt.pe_layer.positional_encoding_gaussian_matrix.float().clone()  # (2, C/2)
        height, width = self._prompt.image_embedding_size
        device = self._frequencies.device
        rows = (torch.arange(height, device=device) + 0.5) / height
        columns = (torch.arange(width, device=device) + 0.5) / width
        centres = torch.stack([columns.expand(height, width), rows.unsqueeze(1).expand(height, width)], dim=-1)
        self._image_positions = self._positions(centres).view(1, height * width, -1)  # (1, hw, C)

    def decode(
        self,
        embedding: Tensor,
        points: Tensor,
        labels: Tensor,
        present: Tensor,
        box: Tensor | None = None,
        box_present: Tensor | None = None,
        mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass of the decoder.

        embedding (B, C, h, w); points (B, n, 2) x, y and box (B, 4) x0, y0, x1, y1 in pixels of SAM's frame;
        labels (B, n) 1 or 0; present (B, n) and box_present (B,) bool; mask_input (B, 1, 4h, 4w) raw logits.
        Returns logits (B, 4, 4h, 4w) and scores (B, 4), float32: the single mask, then the three of multimask.
        """
        decoder = self._decoder
        dtype = decoder.iou_token.weight.dtype
        prompts, seen = self._sparse(points, labels, present, box, box_present)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(prompts), -1, -1)
        tokens = torch.cat([own, prompts.to(dtype)], dim=1)  # (B, t, C)
        seen = torch.cat([seen.new_ones(len(seen), own.shape[1]), seen], dim=1)  # (B, t)
        if mask_input is None:
            dense = self._prompt.no_mask_embed.weight  # (1, C), the same for every place
        else:
            dense = _shrink(self._prompt.mask_downscaling, mask_input.to(dtype))
        image = embedding.to(dtype).flatten(2).transpose(1, 2) + dense  # (B, hw, C)
        queries, image = self._two_way(tokens, image, seen)
        scores = decoder.iou_prediction_head(queries[:, 0])
        heads = decoder.output_hypernetworks_mlps
        hyper = torch.stack([head(queries[:, 1 + mask]) for mask, head in enumerate(heads)], dim=1)
        logits = _enlarge(decoder.output_upscaling, image, hyper, embedding.shape[-2:])
        return logits.float(), scores.float()

    def cascade(
        self, embedding: Tensor, prompts: PointPrompts, geometry: FrameGeometry, settings: CascadeSettings
    ) -> Cascade:
        """Equations 9 to 12 for the frames of `embedding` (B, C, h, w), up to `settings.levels`.

        Where the prompts have several rows per frame (one per region of S_a), each row has its own cascade,
        and a frame's logits are the largest of its rows'; its score is that of the best row, its box holds
        all boxes.
        """
        frames = len(embedding)
        if prompts.frame is not None:
            embedding = embedding[prompts.frame]
        points = geometry.image_to_sam(prompts.points)
        levels: list[Level] = []
        box = box_present = box_sam = None
        for number in range(settings.levels):
            previous = levels[-1] if levels else None
            if number == 2 and previous is not None:
                box, box_present = mask_box(previous.frame_logits)
                box_sam = geometry.image_to_sam(box.view(-1, 2, 2)).flatten(1)
            logits, scores = self.decode(
                embedding,
                points,
                prompts.labels,
                prompts.present,
                box_sam,
                box_present,
                None if previous is None else previous.logits.unsqueeze(1),
            )
            levels.append(_best(logits, scores, settings.multimask[number], geometry))
        made = Cascade(levels, box, box_present)
        return made if prompts.frame is None else _join(made, prompts.frame, frames)

    def _positions(self, places: Tensor) -> Tensor:
        """(..., 2) x, y as shares of SAM's frame -> (..., C) float32 position encoding."""
        turns = (2.0 * places.float() - 1.0) @ self._frequencies * (2.0 * math.pi)
        return torch.cat([turns.sin(), turns.cos()], dim=-1)

    def _sparse(
        self, points: Tensor, labels: Tensor, present: Tensor, box: Tensor | None, box_present: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Prompt tokens (B, n + 1 or n + 3, C) float32 and which of them there are (B, ...).

        As segment_anything has it: positions are of pixel centres half a pixel on, and the token "not a
        point" stands in exactly where there is no box.
        """
        kinds = self._prompt.point_embeddings  # negative, positive, upper left and lower right corner
        frame_height, frame_width = self._prompt.input_image_size

        def encode(places: Tensor) -> Tensor:
            x, y = (places[..., 0] + 0.5) / frame_width, (places[..., 1] + 0.5) / frame_height
            return self._positions(torch.stack([x, y], dim=-1))

        kind = torch.where((labels == 1).unsqueeze(2), kinds[1].weight, kinds[0].weight)
        # an absent point is hidden, not removed: its values must still be finite
        tokens = [encode(points.masked_fill(~present.unsqueeze(2), 0.0)) + kind]
        tokens.append(self._prompt.not_a_point_embed.weight.float().expand(len(points), 1, -1))
        if box is None:
            return torch.cat(tokens, dim=1), torch.cat([present, present.new_ones(len(points), 1)], dim=1)
        there = present.new_ones(len(points)) if box_present is None else box_present
        there = there.unsqueeze(1)
        corners = encode(box.view(-1, 2, 2).masked_fill(~there.unsqueeze(2), 0.0))
        tokens.append(corners + torch.cat([kinds[2].weight, kinds[3].weight]))
        return torch.cat(tokens, dim=1), torch.cat([present, ~there, there, there], dim=1)

    def _two_way(self, tokens: Tensor, image: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The two-way transformer: (B, t, C), (B, hw, C) -> the same. Tokens not `seen` (B, t) are no keys."""
        transformer = self._decoder.transformer
        positions = self._image_positions.to(tokens.dtype)
        queries = tokens
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                queries = _attend(layer.self_attn, queries, queries, queries, seen)
            else:
                placed = queries + tokens
                queries = queries + _attend(layer.self_attn, placed, placed, queries, seen)
            queries = layer.norm1(queries)
            placed_image = image + positions
            queries = queries + _attend(layer.cross_attn_token_to_image, queries + tokens, placed_image, image)
            queries = layer.norm2(queries)
            queries = layer.norm3(queries + layer.mlp(queries))
            attention = layer.cross_attn_image_to_token
            image = image + _attend_to_few(attention, placed_image, queries + tokens, queries, seen)
            image = layer.norm4(image)
        last = transformer.final_attn_token_to_image
        queries = queries + _attend(last, queries + tokens, image + positions, image)
        return transformer.norm_final_attn(queries), image


def to_frame(logits: Tensor, geometry: FrameGeometry) -> Tensor:
    """(B, 4h, 4w) low-resolution logits -> (B, H, W): to SAM's frame, the padding cut off, to the picture."""
    padded = functional.interpolate(
        logits.unsqueeze(1), (geometry.sam_size, geometry.sam_size), mode="bilinear", align_corners=False
    )
    shown = padded[..., : geometry.sam_height, : geometry.sam_width]
    size = (geometry.height, geometry.width)
    return functional.interpolate(shown, size, mode="bilinear", align_corners=False)[:, 0]


def mask_box(frame_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W) -> the tight box of what is above zero, (B, 4) float32 x0, y0, x1, y1 (last pixels, equation
    11), zeros where there is nothing, and (B,) bool whether there is something."""
    columns, rows = frame_logits.amax(1) > 0.0, frame_logits.amax(2) > 0.0

    def ends(marked: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(marked.shape[1], dtype=torch.float32, device=marked.device)
        first = places.masked_fill(~marked, float("inf")).amin(1)
        return first, places.masked_fill(~marked, -1.0).amax(1)

    (x0, x1), (y0, y1) = ends(columns), ends(rows)
    present = columns.any(1)
    return torch.stack([x0, y0, x1, y1], dim=1).masked_fill(~present.unsqueeze(1), 0.0), present


def _heads(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projected queries, keys and values, each (B, heads, tokens, C per head)."""
    split = (attention.num_heads, -1)
    projected = (attention.q_proj(q), attention.k_proj(k), attention.v_proj(v))
    first, second, third = (tensor.unflatten(2, split).transpose(1, 2) for tensor in projected)
    return first, second, third


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """segment_anything's Attention; keys that are not `seen` (B, keys) are left out of the softmax."""
    q, k, v = _heads(attention, q, k, v)
    mask = None if seen is None else seen[:, None, None, :]
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return out


def _attend_to_few(attention: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The same for thousands of queries and a dozen keys: with the queries innermost it is ten times faster
    on a CPU than the general attention, which has nothing to do per query."""
    q, k, v = _heads(attention, q, k, v)
    alike = (k * k.shape[-1] ** -0.5) @ q.transpose(2, 3)  # (B, heads, keys, queries)
    weight = alike.masked_fill(~seen[:, None, :, None], float("-inf")).softmax(2)
    mixed = (v.transpose(2, 3) @ weight).flatten(1, 2)  # (B, C, queries)
    out: Tensor = attention.out_proj(mixed.transpose(1, 2))
    return out


def _shrink(layers: Any, mask: Tensor) -> Tensor:
    """PromptEncoder.mask_downscaling with channels last: (B, 1, 4h, 4w) -> (B, hw, C).

    Its convolutions have a stride as long as their kernel: each is a product with a block's pixels.
    """
    conv1, norm1, activation, conv2, norm2, _, conv3 = layers
    batch, _, height, width = mask.shape
    h, w = height // 4, width // 4
    blocks = mask.view(batch, h, 2, 2, w, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)  # cell, block in it, pixel in that
    x = functional.linear(blocks.reshape(batch, h * w, 4, 4), conv1.weight.flatten(1), conv1.bias)
    x = activation(functional.layer_norm(x, x.shape[-1:], norm1.weight, norm1.bias, norm1.eps)).flatten(2)
    x = functional.linear(x, conv2.weight.permute(0, 2, 3, 1).flatten(1), conv2.bias)
    x = activation(functional.layer_norm(x, x.shape[-1:], norm2.weight, norm2.bias, norm2.eps))
    dense: Tensor = functional.linear(x, conv3.weight.flatten(1), conv3.bias)
    return dense


def _enlarge(layers: Any, image: Tensor, hyper: Tensor, grid: torch.Size) -> Tensor:
    """MaskDecoder.output_upscaling with channels last, and the masks of it.

    (B, hw, C) and (B, m, C/8) -> (B, m, 4h, 4w). Pixels are put in their places only at the end, when m
    channels are left of C/8.
    """
    conv1, norm, activation, conv2, _ = layers
    batch, places, _ = image.shape
    x = image @ conv1.weight.permute(0, 2, 3, 1).flatten(1) + conv1.bias.repeat(4)
    x = x.view(batch, places, 4, -1)  # (B, hw, 4, C/4)
    x = activation(functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    x = x @ conv2.weight.permute(0, 2, 3, 1).flatten(1) + conv2.bias.repeat(4)
    x = activation(x).view(batch, places * 16, -1) @ hyper.transpose(1, 2)  # (B, hw * 16, m)
    h, w = grid
    pixels: Tensor = x.view(batch, h, w, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)  # rows, then columns
    return pixels.reshape(batch, -1, 4 * h, 4 * w)


def _best(logits: Tensor, scores: Tensor, multimask: bool, geometry: FrameGeometry) -> Level:
    """The best scored of the three masks, or the single one."""
    if not multimask:
        return Level(logits[:, 0], scores[:, 0], torch.zeros_like(scores[:, 0], dtype=torch.long), geometry)
    score, index = scores[:, 1:].max(1)
    chosen = (index + 1)[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
    return Level(logits.gather(1, chosen)[:, 0], score, index, geometry)


def _join(cascade: Cascade, frame: Tensor, frames: int) -> Cascade:
    """Rows of several regions -> one row per frame."""

    def reduce(rows: Tensor, how: str) -> Tensor:
        index = frame.view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
        start = rows.new_zeros(frames, *rows.shape[1:])
        return start.scatter_reduce(0, index, rows, how, include_self=False)

    levels = []
    for level in cascade.levels:
        score = reduce(level.score, "amax")
        best = level.score == score[frame]
        index = reduce(torch.where(best, level.index, 3), "amin")
        levels.append(Level(reduce(level.logits, "amax"), score, index, level.geometry))
    if cascade.box is None or cascade.box_present is None:
        return Cascade(levels, None, None)
    there = cascade.box_present.unsqueeze(1)
    low = reduce(cascade.box[:, :2].masked_fill(~there, float("inf")), "amin")
    high = reduce(cascade.box[:, 2:].masked_fill(~there, -1.0), "amax")
    present = reduce(cascade.box_present.int(), "amax").bool()
    box = torch.cat([low, high], dim=1).masked_fill(~present.unsqueeze(1), 0.0)
    return Cascade(levels, box, present)
