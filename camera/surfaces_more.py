"""More full-frame surfaces: solar cells, weld seams, marble, planks, granules."""

import cv2
import numpy as np

from flawline.camera.noise import Picture, cloud, emboss, grain, tint
from flawline.camera.scene import Draft, Element, box, circle, wavy
from flawline.camera.spot import mix


def solar(d: Draft) -> Picture:
    """A cell with fine fingers, bus bars and cell borders; crystal grains in some."""
    h, w = d.canvas.h, d.canvas.w
    base = np.array([[30, 45, 95], [25, 28, 40], [70, 85, 120], [90, 90, 95]], np.float32)[int(d.design.integers(4))]
    rng = d.rng(1)
    plane = 1 + np.float32(0.02) * grain(rng, h, w)
    if d.design.random() < 0.5:  # polycrystalline
        grains = cloud(rng, h, w, d.design.uniform(20, 60) * d.unit)
        plane = plane * (1 + np.float32(d.design.uniform(0.05, 0.2)) * np.round(grains * 1.5))
    d.canvas.colour[:] = tint(plane.astype(np.float32), base)
    pitch = max(3, int(d.design.uniform(4, 14) * d.unit))
    shift = int(rng.integers(pitch))
    d.canvas.colour[shift::pitch] = d.canvas.colour[shift::pitch] * 0.5 + 90
    n = int(d.design.integers(2, 6))
    width = d.design.uniform(4, 14) * d.unit
    silver = np.full(3, d.design.uniform(140, 215), np.float32)
    offset = rng.normal(0, 0.01) * w
    for e in d.elements([Element((k + 0.5) * w / n + offset, h / 2, width) for k in range(n)]):
        d.canvas.fill([box(e.x, e.y, e.size, 1.1 * h, e.angle * 0.1)], silver, mark=True)
    if d.design.random() < 0.4:
        y = d.design.uniform(0.2, 0.8) * h
        d.canvas.fill([box(w / 2, y, 1.1 * w, 5 * d.unit)], d.colours[3] * np.float32(1.2))
    return d.canvas.colour


def weld(d: Draft) -> Picture:
    """A bead of ripples between two sheets, with a tarnished zone along it."""
    h, w = d.canvas.h, d.canvas.w
    picture = d.surface(0)
    rng = d.rng(1)
    xs = np.arange(w, dtype=np.float32)[None, :]
    ys = np.arange(h, dtype=np.float32)[:, None]
    width = d.design.uniform(20, 60) * d.unit
    axis = h * d.design.uniform(0.35, 0.65) + width * np.float32(0.15) * cloud(rng, 1, w, 60 * d.unit, 2)
    across = (ys - axis) / np.float32(width)
    pitch = d.design.uniform(5, 16) * d.unit
    phase = xs / np.float32(pitch) + 1.6 * across**2 + np.float32(0.3) * cloud(rng, h, w, 20 * d.unit, 2)
    height = np.sqrt(np.clip(1 - across**2, 0, 1)) * (
        1 + np.float32(d.design.uniform(0.01, 0.06)) * np.abs(np.sin(phase * np.float32(np.pi)))
    )
    heat = np.exp(-(across**2) / np.float32(d.design.uniform(2, 9)))
    tone = np.array([[0.9, 0.72, 0.5], [0.6, 0.65, 0.9], [0.8, 0.8, 0.8]], np.float32)[int(d.design.integers(3))]
    picture = picture * (1 + (tone - 1) * np.float32(d.design.uniform(0.1, 0.8)) * heat[:, :, None])
    bead = np.clip((1 - np.abs(across)) * 6, 0, 1).astype(np.float32)
    relief = emboss((height * width * 0.5).astype(np.float32), d.canvas.light, d.design.uniform(0.6, 1.5))
    shiny = relief[:, :, None] * d.colours[3] * (1 + np.float32(0.05) * grain(rng, h, w))[:, :, None]
    return mix(picture, shiny, bead)


def marble(d: Draft) -> Picture:
    """Polished stone with veins: thin wandering lines that are normal."""
    h, w = d.canvas.h, d.canvas.w
    rng = d.rng(1)
    base = d.colours[0]
    cell = d.design.uniform(60, 200) * d.unit
    veins = np.zeros((h, w), np.float32)
    for k in range(int(d.design.integers(1, 4))):
        sharp = d.design.uniform(6, 40)
        veins = np.maximum(veins, (0.9**k) * np.exp(-np.abs(cloud(rng, h, w, cell, 4)) * np.float32(sharp)))
    mottle = np.float32(d.design.uniform(0.02, 0.10)) * cloud(rng, h, w, 50 * d.unit, 3)
    picture = tint((1 + mottle + 0.01 * grain(rng, h, w)).astype(np.float32), base)
    return mix(picture, d.colours[1], veins, d.design.uniform(0.2, 0.8))


def planks(d: Draft) -> Picture:
    """Boards side by side with gaps, own tones and knots."""
    h, w = d.canvas.h, d.canvas.w
    picture = d.surface(0)
    rng = d.rng(1)
    n = int(d.design.integers(2, 8))
    gap = max(1, round(d.design.uniform(1, 4) * d.unit))
    for k in range(n + 1):
        a, b = int((k - 0.5) * h / n), int((k + 0.5) * h / n)
        piece = picture[max(0, a) : max(0, b)]
        piece *= np.float32(rng.normal(1, 0.08))
        if k % 2:
            piece[:] = np.roll(piece, int(rng.integers(w)), 1)
        picture[max(0, b) : max(0, b) + gap] *= np.float32(0.35)
    d.canvas.colour[:] = picture
    for _ in range(int(d.design.integers(0, 4))):
        x, y, r = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(5, 16) * d.unit
        for k in range(3):
            d.canvas.fill(
                [wavy(rng, x, y, r * (1 - 0.3 * k), 0.15, 1.3)],
                d.materials[0].second * np.float32(0.9 - 0.2 * k),
                0.7,
                mark=k == 0,
            )
    softened: Picture = cv2.GaussianBlur(d.canvas.colour, (3, 3), 0)
    return softened


def grains(d: Draft) -> Picture:
    """A bed of equal lumps: pellets, seeds, beads."""
    h, w = d.canvas.h, d.canvas.w
    rng = d.rng(1)
    d.canvas.colour[:] = d.colours[0] * np.float32(0.25)
    r = d.design.uniform(20, 50) * d.unit
    square = d.design.random() < 0.3
    rough = d.design.uniform(0, 0.25)
    stretch = d.design.uniform(1, 1.5)
    n = int(min(160, 1.5 * h * w / (3.14 * r * r)))
    for _ in range(n):
        x, y, size = rng.uniform(0, w), rng.uniform(0, h), r * rng.uniform(0.8, 1.15)
        outline = box(x, y, 1.8 * size, 1.8 * size, rng.uniform(0, 3), 0.3 * size) if square else circle(x, y, size)
        if not square and rough > 0.05:
            outline = wavy(rng, x, y, size, rough, stretch, n=20)
        d.canvas.fill([outline + np.array([1.5, 1.5], np.float32)], d.colours[0] * np.float32(0.2), 0.5)
        d.canvas.fill(
            [outline], d.colours[0] * np.float32(rng.uniform(0.85, 1.15)), bevel=0.3 * size, strength=1.2, mark=True
        )
    return d.canvas.colour
