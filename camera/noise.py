"""Noise for drawn parts: grain from a fixed bank, clouds from small grids, relief as light and shade."""

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]  # (H, W)
Picture = NDArray[np.float32]  # (H, W, 3), RGB, 0 to 255

_BANK = 1024


@cache
def _bank() -> Plane:
    """Standard normal numbers, (1024, 1024), always the same: crops of it are far cheaper than fresh draws."""
    return np.random.default_rng(20).standard_normal((_BANK, _BANK), dtype=np.float32)


def grain(rng: np.random.Generator, h: int, w: int) -> Plane:
    """White noise of mean 0 and deviation 1, (h, w): a random crop of a fixed bank, mirrored at random."""
    bank = _bank()
    if h > _BANK or w > _BANK:
        bank = np.tile(bank, (-(-h // _BANK) + 1, -(-w // _BANK) + 1))
    y = int(rng.integers(0, bank.shape[0] - h + 1))
    x = int(rng.integers(0, bank.shape[1] - w + 1))
    crop = bank[y : y + h, x : x + w]
    flip = int(rng.integers(0, 4))
    return np.ascontiguousarray(crop[:: -1 if flip & 1 else 1, :: -1 if flip & 2 else 1])


def cloud(rng: np.random.Generator, h: int, w: int, cell: float, octaves: int = 1, stretch: float = 1.0) -> Plane:
    """Smooth noise of mean 0 and deviation about 1, (h, w).

    `cell` is the size of its lumps in pixels, halved and weakened with every octave; `stretch` makes the
    lumps that much longer along x.
    """
    total = np.zeros((h, w), np.float32)
    weight = 1.0
    norm = 0.0
    for _ in range(octaves):
        gh = max(2, int(np.ceil(h / cell)) + 1)
        gw = max(2, int(np.ceil(w / (cell * stretch))) + 1)
        grid = rng.standard_normal((gh, gw), dtype=np.float32)
        total += weight * cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC)
        norm += weight**2
        weight *= 0.55
        cell = max(cell / 2, 1.0)
    return total * np.float32(1.25 / np.sqrt(norm))


def emboss(height: Plane, light: tuple[float, float], strength: float) -> Plane:
    """Factor of brightness for a relief seen under light from direction `light` (x, y), (H, W), around 1."""
    dx = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    dy = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=0.125)
    shade = dx * np.float32(-light[0] * strength) + dy * np.float32(-light[1] * strength)
    relief: Plane = np.clip(1.0 + shade, 0.25, 2.2)
    return relief


def tint(plane: Plane, colour: NDArray[np.float32]) -> Picture:
    """A plane of brightness factors painted in one colour, (H, W, 3)."""
    red, green, blue = (np.float32(value) for value in colour)
    painted: Picture = cv2.merge((plane * red, plane * green, plane * blue))
    return painted


def spread(plane: Plane) -> Picture:
    """The plane three times, (H, W, 3): multiplying by it is much faster than broadcasting over a last axis of 3."""
    return cv2.merge((plane, plane, plane)) if plane.size else np.empty((*plane.shape, 3), np.float32)
