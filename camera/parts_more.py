"""Painters of springs, lenses, brushes, wire clips and keypads."""

import numpy as np

from flawline.camera.noise import cloud, tint
from flawline.camera.parts_metal import finish, lettering
from flawline.camera.scene import Draft, Element, box, circle, rotate


def spring(d: Draft) -> None:
    """A coil spring from the side: the near halves of the windings over the far ones."""
    s, rng = d.size, d.design
    n = int(rng.integers(5, 16))
    r = rng.uniform(0.1, 0.22) * s
    pitch = 0.86 * s / n
    wire = min(rng.uniform(0.025, 0.06) * s, 0.75 * pitch)
    colour = d.colours[0]
    t = np.linspace(0, np.pi, 14)
    for k in range(n):
        y = 0.07 * s + k * pitch
        back = np.stack([s / 2 + r * np.cos(t), y + pitch * (0.5 + t / np.pi * 0.5)], 1).astype(np.float32)
        d.canvas.stroke(back, wire, colour * np.float32(0.5), gloss=0.2)
    for e in d.elements([Element(s / 2, 0.07 * s + k * pitch, pitch) for k in range(n)]):
        arc = np.stack([-r * np.cos(t), pitch * t / np.pi * 0.5 + 0.6 * e.bend * pitch * np.sin(t)], 1)
        d.canvas.stroke(rotate(arc, e.x, e.y, e.angle * 0.3), wire, colour, mark=True)


def lens(d: Draft) -> None:
    """Clear glass in a ring: tinted, with reflections of lamps and windows."""
    s, rng = d.size, d.design
    d.canvas.fill([circle(s / 2, s / 2, 0.47 * s)], d.surface(0), bevel=rng.uniform(1, 4))
    inner = rng.uniform(0.33, 0.44) * s
    deep = tint(1 + 0.15 * cloud(d.rng(3), s, s, 150 * d.unit), d.colours[1] * np.float32(rng.uniform(0.15, 0.9)))
    d.canvas.fill([circle(s / 2, s / 2, inner)], deep, bevel=rng.uniform(2, 8), strength=-2, mark=True)
    finish(d)
    for _ in range(int(rng.integers(0, 4))):
        a, q = rng.uniform(0, 6.28), rng.uniform(0, 0.75) * inner
        x, y = s / 2 + q * np.cos(a), s / 2 + q * np.sin(a)
        shape = circle(x, y, rng.uniform(0.02, 0.08) * s) if rng.random() < 0.5 else box(x, y, 0.1 * s, 0.14 * s, 0.2)
        d.canvas.fill([shape], np.full(3, 240, np.float32), opacity=rng.uniform(0.15, 0.8), add=False)
    for k in range(int(rng.integers(0, 3))):
        ring = inner * (0.9 - 0.25 * k)
        d.canvas.fill([circle(s / 2, s / 2, ring), circle(s / 2, s / 2, ring - 0.01 * s)], d.colours[2], opacity=0.4)


def brush(d: Draft) -> None:
    """A brush head with rows of bristle tufts."""
    s, rng = d.size, d.design
    w, h = rng.uniform(0.35, 0.6) * s, 0.9 * s
    d.canvas.fill([box(s / 2, s / 2, w, h, 0, 0.45 * w)], d.surface(0), bevel=3)
    finish(d)
    columns, rows = int(rng.integers(3, 6)), int(rng.integers(6, 12))
    cell = min(0.82 * w / columns, 0.78 * h / rows)
    items = [
        Element(
            s / 2 + (i - (columns - 1) / 2) * cell, s / 2 + (j - (rows - 1) / 2) * cell, 0.42 * cell, seed=j * 9 + i
        )
        for j in range(rows)
        for i in range(columns)
    ]
    tones = (d.colours[1], d.colours[2], np.full(3, 230, np.float32))
    for e in d.elements(items):
        jitter = d.rng(100 + e.seed)
        tone = tones[e.seed // 9 % 3]
        for _ in range(7):
            x, y = e.x + jitter.normal(0, 0.35) * e.size, e.y + jitter.normal(0, 0.35) * e.size
            tip = np.array(
                [[x, y], [x + (jitter.normal(0, 0.4) + 2 * e.bend) * e.size, y + jitter.normal(0, 0.4) * e.size]],
                np.float32,
            )
            d.canvas.stroke(tip, max(1.5, 0.55 * e.size), tone * np.float32(jitter.uniform(0.7, 1.1)), gloss=0.2)
        d.canvas.fill([circle(e.x, e.y, 0.3 * e.size)], tone, opacity=0.5, mark=True)


def clip(d: Draft) -> None:
    """A bent wire: hook, clip, loop or staple; several strands in some."""
    s, rng = d.size, d.design
    wire = rng.uniform(0.02, 0.07) * s
    n = int(rng.integers(4, 9))
    xs = np.linspace(0.12, 0.88, n) * s
    corners = np.stack([xs, rng.uniform(0.15, 0.85, n) * s], 1)
    colour = d.colours[0]
    t = np.linspace(0, n - 1, 60)
    smooth = rng.random() < 0.6
    path = np.stack([np.interp(t, np.arange(n), corners[:, k]) for k in range(2)], 1)
    if smooth:
        kernel = np.ones(13) / 13
        padded = np.pad(path, ((6, 6), (0, 0)), "edge")
        path = np.stack([np.convolve(padded[:, k], kernel, "valid") for k in range(2)], 1)
    for e in d.elements([Element(0.0, 0.0, 0.1 * s)]):
        away = np.linspace(-1, 1, 60)[:, None] ** 2 * np.array([[0, e.bend * 0.25 * s]])
        line = rotate(path + away - s / 2, s / 2 + e.x, s / 2 + e.y, e.angle * 0.5)
        d.canvas.stroke(line, wire, colour, mark=True)


def keypad(d: Draft) -> None:
    """A panel of keys with printed signs."""
    s, rng = d.size, d.design
    d.canvas.fill([box(s / 2, s / 2, 0.95 * s, 0.95 * s, 0, 0.05 * s)], d.surface(0))
    finish(d)
    nx, ny = int(rng.integers(2, 6)), int(rng.integers(2, 6))
    cell = 0.86 * s / max(nx, ny)
    round_keys = rng.random() < 0.4
    items = [
        Element(s / 2 + (i - (nx - 1) / 2) * cell, s / 2 + (j - (ny - 1) / 2) * cell, 0.36 * cell, seed=j * nx + i)
        for j in range(ny)
        for i in range(nx)
    ]
    for e in d.elements(items, 0.6):
        outline = (
            circle(e.x, e.y, e.size) if round_keys else box(e.x, e.y, 2 * e.size, 1.7 * e.size, e.angle, 0.3 * e.size)
        )
        d.canvas.shade([outline + np.array([2, 2], np.float32)], 0.6, 2.0)
        d.canvas.fill([outline], d.colours[1], bevel=2, strength=2, mark=True)
    for k, e in enumerate(items):
        if k < 12 and rng.random() < 0.8:
            lettering(d, e.x / s, e.y / s, 0.9 * e.size / s, 0.5 * e.size / s)
