"""Painters of screws and tubes: lit cylinders, smooth or threaded."""

import numpy as np

from flawline.camera.noise import Plane, cloud
from flawline.camera.parts_metal import finish
from flawline.camera.scene import Draft, Element, box, mask_of


def _cylinder(
    d: Draft,
    x0: float,
    x1: float,
    y0: float,
    y1: float,
    tag: int,
    colour: np.ndarray,
    ridges: float = 0.0,
    lean: float = 0.0,
) -> None:
    """A lit cylinder along y between x0 and x1, with helical ridges of the given pitch (pixels) or smooth."""
    n = d.canvas
    xs = (np.arange(n.w, dtype=np.float32) - np.float32((x0 + x1) / 2)) / np.float32((x1 - x0) / 2)
    round_ = np.clip(xs, -1, 1)[None, :]
    lit = d.design.uniform(-0.5, 0.5)
    shade: Plane = (
        0.45
        + 0.55 * np.sqrt(np.maximum(1 - round_**2, 0))
        + 0.6 * np.exp(-((round_ - np.float32(lit)) ** 2) / np.float32(0.02))
    )
    shade = np.repeat(shade, n.h, 0).astype(np.float32)
    offset = np.zeros((1, n.w), np.float32)
    if ridges:
        ys = np.arange(n.h, dtype=np.float32)[:, None]
        phase = (ys + lean * round_ * np.float32(ridges)) / np.float32(ridges) + np.float32(d.rng(tag).uniform(0, 1))
        wave = phase - np.floor(phase)
        shade = shade * (0.65 + 0.6 * np.abs(wave * 2 - 1) + 0.25 * np.cos(6.283 * wave))
        offset = np.abs(wave * 2 - 1) * np.float32(min(0.35 * ridges, 0.12 * (x1 - x0)))
    shade = shade * (1 + 0.03 * cloud(d.rng(tag + 1), n.h, n.w, 30 * max(d.unit, 0.3), 2))
    mask = mask_of([np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32)], n.h, n.w)
    if ridges:
        half = np.float32((x1 - x0) / 2)
        mask = mask * np.clip(half - offset - np.abs(xs)[None, :] * half + 0.5, 0, 1)
    n.stamp(mask.astype(np.float32), shade[:, :, None] * colour, 0, 0)


def screw(d: Draft) -> None:
    """A screw or bolt from the side: head, shank, thread."""
    s, rng = d.size, d.design
    colour = d.colours[0]
    r = rng.uniform(0.06, 0.16) * s
    head = rng.uniform(1.5, 2.2) * r
    h0, h1 = 0.05 * s, rng.uniform(0.12, 0.22) * s
    smooth = rng.uniform(0, 0.3)
    end = rng.uniform(0.8, 0.95) * s
    start = h1 + smooth * (end - h1)
    if smooth > 0.05:
        _cylinder(d, s / 2 - r, s / 2 + r, h1 - 2, start + 2, 10, colour)
    _cylinder(
        d,
        s / 2 - 1.05 * r,
        s / 2 + 1.05 * r,
        start,
        end,
        12,
        colour,
        ridges=rng.uniform(0.018, 0.06) * s,
        lean=rng.uniform(0.2, 0.5),
    )
    if rng.random() < 0.5:
        tip = np.array([[s / 2 - 0.8 * r, end - 1], [s / 2 + 0.8 * r, end - 1], [s / 2, end + 0.6 * r]], np.float32)
        d.canvas.fill([tip], colour * np.float32(0.8))
    if rng.random() < 0.5:
        _cylinder(d, s / 2 - head, s / 2 + head, h0, h1, 14, colour)
    else:
        cone = np.array([[s / 2 - head, h0], [s / 2 + head, h0], [s / 2 + r, h1], [s / 2 - r, h1]], np.float32)
        d.canvas.fill([cone], d.surface(0), bevel=2)
    finish(d, 0.4)


def tube(d: Draft) -> None:
    """A pipe, hose or shaft from the side, smooth or corrugated, running through the picture."""
    s, rng = d.size, d.design
    r = rng.uniform(0.12, 0.4) * s
    surface = d.surface(0)
    _cylinder(
        d,
        s / 2 - r,
        s / 2 + r,
        -2,
        s + 2,
        10,
        np.full(3, 255, np.float32),
        ridges=rng.uniform(0.04, 0.12) * s if rng.random() < 0.3 else 0.0,
    )
    d.canvas.colour *= surface * np.float32(1 / 235)
    rings = [Element(s / 2, (k + 0.5) * s / 3, 0.03 * s) for k in range(int(rng.integers(0, 4)))]
    for e in d.elements(rings):
        ring = box(e.x, e.y, 2.05 * r, e.size, e.angle * 0.3)
        d.canvas.shade([ring], 0.6, 0.6)
        d.canvas.shade([ring + np.array([0, -e.size * 0.5], np.float32)], 1.3, 0.6)
