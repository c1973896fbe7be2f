"""CLIP locates: from dense image features and text features to the map of P(abnormal), in CLIP's input frame."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flawline.config.errors import BundleError
from flawline.models.clip import DenseClip

WINDOW_TEMPERATURE = 0.07
"""Of the softmax between the two texts in the training-free localiser, as public reproductions have it."""
SCALES = (2, 3)
"""Edges of its windows, patches."""


class AdapterLocaliser(nn.Module):
    """Trained linear layers, one a tap, from token space into the joint space (the paper's section 4.1.2).

    With token x of tap i: z = W_i x + b_i, normalised; logits are `temperature` times the cosines with the two
    texts; they are brought to S x S with aligned corners, then softmax, then the mean over taps. `centred`
    subtracts the picture's mean token from each token before the layer, so that what is judged is how a place
    differs from the rest of its own picture; the published layers were trained without it.
    """

    def __init__(self, channels: Sequence[int], embed_dim: int, temperature: float, centred: bool) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, embed_dim) for width in channels)
        self.temperature = temperature
        self.centred = centred

    def embed(self, tap: int, features: Tensor) -> Tensor:
        """Tap number `tap`, (B, C, h, w) -> (B, h, w, D) float32 unit vectors in the joint space."""
        tokens = features.float().permute(0, 2, 3, 1)
        if self.centred:
            tokens = tokens - tokens.mean(dim=(1, 2), keepdim=True)
        return functional.normalize(self.fc[tap](tokens), dim=-1)

    def tap_map(self, tap: int, features: Tensor, text: Tensor, size: int) -> Tensor:
        """(B, C, h, w), text (D, 2) -> (B, S, S) float32, P(abnormal) by this tap alone."""
        # The softmax over two classes is the sigmoid of their difference, and enlarging is linear.
        difference = self.embed(tap, features) @ (self.temperature * (text[:, 1] - text[:, 0]))
        enlarged = functional.interpolate(difference.unsqueeze(1), (size, size), mode="bilinear", align_corners=True)
        return enlarged.squeeze(1).sigmoid()

    def forward(self, taps: Sequence[Tensor], text: Tensor, size: int) -> Tensor:
        """Features of every tap, text (D, 2) -> (B, S, S) float32 in [0, 1]."""
        total = self.tap_map(0, taps[0], text, size)
        for number in range(1, len(taps)):
            total = total + self.tap_map(number, taps[number], text, size)
        return total / len(taps)


class WindowLocaliser:
    """Training-free: CLIP judges windows of 2 x 2 and 3 x 3 patches and the whole image (WinCLIP).

    A window's tokens are taken after the patch embedding and positions, joined by the class token, and go
    through all blocks. Per scale a patch gets the harmonic mean of its windows' scores; over the two scales
    and the image the harmonic mean again. Needs open_clip's own ViT with a class token.
    """

    def __init__(self, clip: DenseClip, windows_at_once: int = 256) -> None:
        self._visual: Any = clip.model.visual
        if not hasattr(self._visual, "class_embedding") or getattr(self._visual, "attn_pool", None) is not None:
            raise BundleError(
                "localiser 'windows' needs a CLIP with open_clip's ViT image tower; use one with trained layers instead"
            )
        if min(self._visual.grid_size) < max(SCALES):
            raise BundleError(
                f"localiser 'windows' needs a grid of 3 x 3 patches or more, this CLIP has {self._visual.grid_size}"
            )
        self._at_once = windows_at_once

    def __call__(self, normalised: Tensor, text: Tensor, size: int) -> Tensor:
        """(B, 3, S, S) normalised, text (D, 2) -> (B, S, S) float32 in [0, 1]."""
        tokens, grid = self._embedded(normalised)
        whole = self._score(tokens, text)  # (B,)
        inverse = 1.0 / whole.clamp_min(1e-12)[:, None, None].expand(-1, *grid)
        for scale in SCALES:
            inverse = inverse + 1.0 / self._scale_map(tokens, grid, scale, text).clamp_min(1e-12)
        harmonic = torch.nan_to_num(3.0 / inverse)
        enlarged = functional.interpolate(harmonic.unsqueeze(1), (size, size), mode="bilinear", align_corners=False)
        return enlarged.squeeze(1)

    def _embedded(self, normalised: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, 1 + h w, C): class token and patches with their positions, before the first norm."""
        visual = self._visual
        patches = visual.conv1(normalised)
        grid = (int(patches.shape[-2]), int(patches.shape[-1]))
        patches = patches.flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype), grid

    def _score(self, tokens: Tensor, text: Tensor) -> Tensor:
        """(N, n, C) embedded tokens -> (N,) float32, P(abnormal) of each."""
        visual = self._visual
        encoded = visual.transformer(visual.ln_pre(tokens))  # batch first, as open_clip 3 has it
        pooled = visual.ln_post(encoded[:, 0]) @ visual.proj
        logits = functional.normalize(pooled.float(), dim=-1) @ text / WINDOW_TEMPERATURE
        return logits.softmax(dim=-1)[:, 1]

    def _scale_map(self, tokens: Tensor, grid: tuple[int, int], scale: int, text: Tensor) -> Tensor:
        """(B, h, w): harmonic mean of the scores of all windows of scale x scale patches over each patch."""
        batch, device = tokens.shape[0], tokens.device
        height, width = grid
        numbers = torch.arange(height * width, device=device).view(height, width)
        windows = numbers.unfold(0, scale, 1).unfold(1, scale, 1).reshape(-1, scale * scale)  # (n, scale^2)
        inverse = tokens.new_zeros(batch, height * width, dtype=torch.float32)
        covered = torch.zeros(height * width, device=device)
        for start in range(0, len(windows), self._at_once):
            part = windows[start : start + self._at_once]
            members = torch.cat([torch.zeros_like(part[:, :1]), part + 1], dim=1)
            chosen = tokens[:, members].flatten(0, 1)  # (B n, 1 + scale^2, C)
            scores = self._score(chosen, text).view(batch, -1)
            spread = (1.0 / scores.clamp_min(1e-12)).repeat_interleave(scale * scale, dim=1)
            inverse.index_add_(1, part.flatten(), spread)
            covered.index_add_(0, part.flatten(), torch.ones(part.numel(), device=device))
        return torch.nan_to_num(covered / inverse).view(batch, height, width)
