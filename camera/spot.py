"""The place of a defect: a window of the picture, and the outlines that defects are drawn with."""

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from flawline.camera.noise import Picture, Plane, cloud, spread
from flawline.camera.scene import Outline

Rng = np.random.Generator


@dataclass
class Spot:
    """A window of the scene with the defect's centre (pixels in the window) and equal-area radius."""

    picture: Picture  # (h, w, 3), the surface as it is
    body: Plane  # (h, w), where the part is
    under: Picture  # (h, w, 3), what lies beneath it
    whole: Picture  # (H, W, 3), the full picture
    cx: float
    cy: float
    r: float
    unit: float
    light: tuple[float, float]

    @property
    def mean(self) -> Picture:
        """Colour of the surface close by, (3,)."""
        reach = max(2, int(self.r))
        y, x = int(self.cy), int(self.cx)
        near = self.picture[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        return np.asarray(near.reshape(-1, 3).mean(0), np.float32)


def contrast(rng: Rng) -> float:
    """Strength of a defect, 0.12 (barely visible) to 1."""
    return float(0.12 + 0.88 * rng.beta(1.4, 1.3))


def mix(picture: Picture, colour: Picture, cover: Plane, opacity: float = 1.0) -> Picture:
    """`colour`, (3,) or (h, w, 3), laid over the picture where `cover`, 0 to 1, says so."""
    mixed: Picture = picture + (colour - picture) * spread(cover * np.float32(opacity))
    return mixed


def blob(rng: Rng, spot: Spot, rough: float, soft: float, stretch: float = 1.0, scale: float = 1.0) -> Plane:
    """An irregular area about `scale` times the spot's radius, 0 to 1; `soft` is its edge's width in radii."""
    h, w = spot.body.shape
    ys, xs = np.mgrid[:h, :w].astype(np.float32)
    dx, dy = xs - np.float32(spot.cx), ys - np.float32(spot.cy)
    if stretch != 1.0:
        turn = rng.uniform(0, 3.14)
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        dx, dy = (c * dx + s * dy) / np.float32(stretch**0.5), (c * dy - s * dx) * np.float32(stretch**0.5)
    level = 1 - np.sqrt(dx * dx + dy * dy) / np.float32(max(1.0, scale * spot.r))
    if rough:
        level += np.float32(0.35 * rough) * cloud(rng, h, w, max(3.0, spot.r * rng.uniform(0.3, 0.9)), 3)
    area: Plane = np.clip(level / np.float32(max(soft, 0.8 / max(1.0, spot.r))), 0, 1)
    return area


def curve(rng: Rng, x: float, y: float, length: float, angle: float, bend: float) -> Outline:
    """A smooth line through (x, y), (24, 2)."""
    t = np.linspace(-0.5, 0.5, 24)
    turn = angle + bend * (rng.normal(0, 2.5) * t + rng.normal(0, 1.2) * np.sin(6 * t + rng.uniform(0, 6)))
    steps = np.stack([np.cos(turn), np.sin(turn)], 1) * (length / 24)
    path = np.cumsum(steps, 0)
    moved: Outline = (path - path[12] + [x, y]).astype(np.float32)
    return moved


def line_mask(spot: Spot, line: Outline, width: float, taper: bool = False) -> Plane:
    """Coverage of a line of `width` pixels, 0 to 1; `taper` lets it fade out at its ends."""
    mask = np.zeros(spot.body.shape, np.uint8)
    points = np.round(line * 16).astype(np.int32)
    if not taper:
        cv2.polylines(mask, [points], False, 255, max(1, round(width)), cv2.LINE_AA, 4)
    else:
        n = len(points)
        cuts = np.linspace(0, n - 1, 9).astype(int)
        for k, (a, b) in enumerate(pairwise(cuts)):
            share = 1 - abs((k + 0.5) / 8 * 2 - 1) ** 2
            thick = max(1, round(width * (0.3 + 0.9 * share)))
            cv2.polylines(mask, [points[a : b + 1]], False, int(90 + 165 * share), thick, cv2.LINE_AA, 4)
    strength = min(1.0, max(width, 0.4))
    return mask.astype(np.float32) * np.float32(strength / 255)
