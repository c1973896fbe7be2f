"""Painters of packed and everyday goods: cartons, bottles, pills, capsules, food, zippers, labels."""

import cv2
import numpy as np

from flawline.camera.noise import cloud, emboss, grain, tint
from flawline.camera.parts_metal import finish, lettering
from flawline.camera.scene import Draft, Element, box, circle, wavy


def _barcode(d: Draft, x: float, y: float, w: float, h: float) -> None:
    ink = np.array([25, 25, 28], np.float32)
    place = x - w / 2
    while place < x + w / 2:
        bar = d.design.uniform(0.01, 0.05) * w
        d.canvas.fill([box(place + bar / 2, y, bar, h)], ink, add=False)
        place += bar + d.design.uniform(0.015, 0.05) * w


def label(d: Draft) -> None:
    """A printed label: frame, lines of text, a bar code, a symbol."""
    s, rng = d.size, d.design
    w, h = rng.uniform(0.7, 0.98) * s, rng.uniform(0.4, 0.9) * s
    d.canvas.fill([box(s / 2, s / 2, w, h, 0, rng.uniform(0, 0.06) * s)], d.surface(0))
    finish(d, 0.5)
    if rng.random() < 0.5:
        d.canvas.fill([box(s / 2, s / 2, 0.93 * w, 0.9 * h), box(s / 2, s / 2, 0.91 * w, 0.87 * h)], d.colours[1])
    if rng.random() < 0.5:
        d.canvas.fill([box(s / 2, s / 2 - 0.32 * h, 0.86 * w, 0.16 * h)], d.colours[2])
    if rng.random() < 0.4:
        d.canvas.fill(
            [circle(s / 2 - 0.3 * w, s / 2, 0.09 * s), circle(s / 2 - 0.3 * w, s / 2, 0.06 * s)],
            d.colours[1],
            mark=True,
        )
    if rng.random() < 0.5:
        _barcode(d, s / 2 + 0.2 * w, s / 2 + 0.3 * h, 0.35 * w, 0.2 * h)
    lettering(d, 0.5, rng.uniform(0.4, 0.55), 0.8 * w / s, rng.uniform(0.04, 0.11), int(rng.integers(1, 4)))


def carton(d: Draft) -> None:
    """A box seen from the front or a corner, with tape or a printed label."""
    s, rng = d.size, d.design
    w, h = rng.uniform(0.6, 0.85) * s, rng.uniform(0.5, 0.8) * s
    face = d.surface(0)
    depth = rng.uniform(0, 0.12) * s
    y0 = s / 2 + depth / 2
    if depth > 0.03 * s:
        left, top = s / 2 - w / 2, y0 - h / 2
        d.canvas.fill(
            [
                np.array(
                    [
                        [left, top + 1],
                        [left + w, top + 1],
                        [left + w + depth, top - depth],
                        [left + depth, top - depth],
                    ],
                    np.float32,
                )
            ],
            face * np.float32(1.15),
        )
        d.canvas.fill(
            [
                np.array(
                    [
                        [left + w - 1, top],
                        [left + w + depth, top - depth],
                        [left + w + depth, top + h - depth],
                        [left + w - 1, top + h],
                    ],
                    np.float32,
                )
            ],
            face * np.float32(0.65),
        )
    d.canvas.fill([box(s / 2, y0, w, h)], face)
    finish(d)
    if rng.random() < 0.5:
        d.canvas.fill([box(s / 2, y0, w, 0.09 * s)], d.colours[1], opacity=rng.uniform(0.4, 0.9), add=False)
    if rng.random() < 0.5:
        d.canvas.fill(
            [box(s / 2 + rng.uniform(-0.1, 0.1) * w, y0 + 0.1 * h, 0.6 * w, 0.45 * h)],
            np.array([235, 235, 228], np.float32),
            bevel=0.8,
            mark=True,
        )
        _barcode(d, s / 2, y0 + 0.22 * h, 0.3 * w, 0.1 * h)
    lettering(d, 0.5, y0 / s, 0.55 * w / s, rng.uniform(0.04, 0.09), int(rng.integers(1, 3)))


def bottle(d: Draft) -> None:
    """A bottle's mouth from above, or a bottle from the side with cap and label."""
    s, rng = d.size, d.design
    glass = d.colours[0]
    if rng.random() < 0.5:
        centre = s / 2
        noise = d.rng(4)
        radius = 0.47
        for k in range(int(rng.integers(4, 8))):
            level = rng.uniform(0.15, 1.3)
            plane = level * (1 + 0.10 * cloud(noise, s, s, 60 * d.unit, 2))
            d.canvas.fill(
                [circle(centre, centre, radius * s)],
                tint(plane.astype(np.float32), glass),
                bevel=rng.uniform(1, 5),
                strength=2,
                mark=k == 1,
            )
            radius *= rng.uniform(0.7, 0.93)
        d.canvas.fill([circle(centre, centre, radius * s)], glass * np.float32(0.08))
        for _ in range(int(rng.integers(0, 5))):  # reflections of lamps
            a, q = rng.uniform(0, 6.28), rng.uniform(0.25, 0.45) * s
            d.canvas.shade(
                [circle(centre + q * np.cos(a), centre + q * np.sin(a), 0.05 * s, 0.015 * s, a + 1.57)], 1.9, 0.012 * s
            )
        return
    width, top = rng.uniform(0.28, 0.5) * s, 0.28 * s
    neck = width * rng.uniform(0.3, 0.6)
    outline = np.array(
        [
            [s / 2 - neck / 2, 0.1 * s],
            [s / 2 + neck / 2, 0.1 * s],
            [s / 2 + neck / 2, top - 0.08 * s],
            [s / 2 + width / 2, top + 0.05 * s],
            [s / 2 + width / 2, 0.95 * s],
            [s / 2 - width / 2, 0.95 * s],
            [s / 2 - width / 2, top + 0.05 * s],
            [s / 2 - neck / 2, top - 0.08 * s],
        ],
        np.float32,
    )
    d.canvas.fill([outline], d.surface(0))
    xs = (np.arange(s, dtype=np.float32) - s / 2) / np.float32(width / 2)
    lit = (
        0.55
        + 0.5 * np.sqrt(np.clip(1 - xs * xs, 0, 1))
        + 0.5 * np.exp(-((xs - np.float32(rng.uniform(-0.6, 0.6))) ** 2) / 0.01)
    )
    d.canvas.colour *= lit[None, :, None].astype(np.float32)
    for e in d.elements([Element(s / 2, 0.12 * s, 0.12 * s)]):
        d.canvas.fill([box(e.x, e.y, neck * 1.2, e.size, e.angle, 0.01 * s)], d.colours[1], bevel=3, mark=True)
    for e in d.elements([Element(s / 2, 0.62 * s, 0.25 * s)]):
        d.canvas.fill([box(e.x, e.y, width, 1.2 * e.size, e.angle * 0.2)], d.colours[2], mark=True)
    lettering(d, 0.5, 0.62, 0.75 * width / s, 0.06, 2)


def _pillow(d: Draft, mask: np.ndarray, soft: float, strength: float) -> None:
    relief = emboss(cv2.GaussianBlur(mask, (0, 0), soft) * np.float32(2.5 * soft), d.canvas.light, strength)
    d.canvas.colour *= relief[:, :, None]


def pill(d: Draft) -> None:
    """A tablet: domed, often with a score line or an engraving, sometimes speckled."""
    s, rng = d.size, d.design
    rx, ry = 0.42 * s, 0.42 * s * rng.uniform(0.5, 1)
    outline = circle(s / 2, s / 2, rx, ry) if rng.random() < 0.6 else box(s / 2, s / 2, 2 * rx, 2 * ry, 0, ry)
    colour = (255 - (255 - d.colours[0]) * np.float32(rng.uniform(0.1, 1))).astype(np.float32)
    noise = d.rng(4)
    surface = tint(1 + 0.03 * grain(noise, s, s) + 0.03 * cloud(noise, s, s, 12 * d.unit, 2), colour)
    if rng.random() < 0.4:
        spots = cloud(noise, s, s, rng.uniform(3, 8) * max(d.unit, 0.4)) > rng.uniform(1.3, 2.2)
        surface[spots] = surface[spots] * 0.4 + d.colours[1] * 0.6
    d.canvas.fill([outline], surface)
    _pillow(d, d.canvas.cover, rng.uniform(0.03, 0.1) * s, rng.uniform(0.5, 1.4))
    if rng.random() < 0.5:
        d.canvas.fill(
            [box(s / 2, s / 2, 0.025 * s, 1.5 * ry)], colour * np.float32(0.8), bevel=2, strength=-2, mark=True
        )
    elif rng.random() < 0.6:
        lettering(d, 0.5, 0.5, 0.5, rng.uniform(0.1, 0.18))


def capsule(d: Draft) -> None:
    """A capsule of two halves, opaque or clear."""
    s, rng = d.size, d.design
    r = rng.uniform(0.13, 0.22) * s
    body = [box(s / 2, s / 2, 2 * r, 0.9 * s, 0, r)]
    d.canvas.fill(body, tint(1 + 0.03 * grain(d.rng(4), s, s), d.colours[0]))
    for e in d.elements([Element(s / 2, 0.275 * s, 0.45 * s)]):
        d.canvas.fill([box(e.x, e.y, 2.08 * r, e.size, e.angle * 0.2, r)], d.colours[1], bevel=1.5, mark=True)
    xs = (np.arange(s, dtype=np.float32) - s / 2) / np.float32(r)
    lit = (
        0.5
        + 0.5 * np.sqrt(np.clip(1 - xs * xs, 0, 1))
        + 0.8 * np.exp(-((xs - np.float32(rng.uniform(-0.5, 0.5))) ** 2) / 0.015)
    )
    d.canvas.colour *= lit[None, :, None].astype(np.float32)
    if rng.random() < 0.5:
        lettering(d, 0.5, 0.65, 1.4 * r / s, rng.uniform(0.05, 0.09), 2)


def food(d: Draft) -> None:
    """A piece of food: a rough lump, baked or grown, with spots."""
    s, rng = d.size, d.design
    part = d.rng(2)
    base = np.array(
        [[185, 130, 75], [120, 75, 45], [215, 180, 120], [160, 60, 40], [100, 120, 50], [230, 210, 170]], np.float32
    )[int(rng.integers(6))]
    rough = rng.uniform(0.03, 0.2)
    stretch = float(rng.uniform(1, 1.35))
    outline = wavy(part, s / 2, s / 2, 0.38 * s / stretch**0.5, rough, stretch)
    height = cloud(part, s, s, rng.uniform(8, 40) * d.unit, 3)
    plane = emboss(height, d.canvas.light, rng.uniform(0.3, 1.2)) * (1 + 0.05 * grain(part, s, s))
    surface = tint(plane.astype(np.float32), base * np.float32(rng.uniform(0.75, 1.15)))
    if rng.random() < 0.5:
        spots = np.clip((cloud(part, s, s, rng.uniform(8, 30) * d.unit, 2) - 0.7) * 3, 0, 0.8)[:, :, None]
        surface += (d.colours[1] * 0.6 - surface) * spots
    d.canvas.fill([outline], surface)
    _pillow(d, d.canvas.cover, rng.uniform(0.05, 0.14) * s, rng.uniform(0.6, 1.4))
    if rng.random() < 0.35:  # chips or seeds on it
        for k in range(int(rng.integers(4, 14))):
            a, q = part.uniform(0, 6.28), 0.3 * s * np.sqrt(part.uniform(0, 1))
            d.canvas.fill(
                [wavy(part, s / 2 + q * np.cos(a), s / 2 + q * np.sin(a), 0.035 * s, 0.3)],
                d.colours[2] * np.float32(0.5),
                bevel=1.5,
                mark=k < 20,
            )


def zipper(d: Draft) -> None:
    """Two rows of teeth on cloth tapes, running through the picture."""
    s, rng = d.size, d.design
    tape = rng.uniform(0.55, 0.98) * s
    d.canvas.fill([box(s / 2, s / 2, tape, 1.1 * s)], d.surface(0))
    pitch = rng.uniform(0.035, 0.09) * s
    length = rng.uniform(0.06, 0.1) * s
    tooth = d.colours[1]
    d.canvas.fill([box(s / 2, s / 2, 2.1 * length, 1.1 * s)], d.colours[0] * np.float32(0.5), add=False)
    shift = d.rng(2).uniform(0, pitch)
    items = [
        Element(s / 2 + side * 0.45 * length, shift + (k + 0.25 * side) * pitch, pitch, seed=k)
        for k in range(-1, int(s / pitch) + 1)
        for side in (-1, 1)
    ]
    inside = [e for e in items if 0.05 * s < e.y < 0.95 * s]
    for e in [e for e in items if e not in inside] + d.elements(inside):
        d.canvas.fill(
            [box(e.x, e.y, length * 1.2, pitch * 0.42, e.angle + e.bend * 0.5, pitch * 0.15)],
            tooth,
            bevel=1,
            strength=2,
            mark=pitch > 0.04 * s,
        )
    for side in (-1, 1):  # seams
        x = s / 2 + side * tape * 0.35
        for k in range(int(s / (0.03 * s))):
            d.canvas.fill(
                [box(x, 0.03 * s * (k + 0.5), 0.006 * s, 0.018 * s)], d.colours[0] * np.float32(1.2), add=False
            )
