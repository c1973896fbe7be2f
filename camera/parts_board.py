"""Painters of electrical parts: components on boards, circuit boards, connectors, cables."""

import numpy as np

from flawline.camera.noise import cloud, grain, tint
from flawline.camera.parts_metal import finish, lettering
from flawline.camera.scene import Draft, Element, box, circle

COPPER = np.array([195, 125, 90], np.float32)
TIN = np.array([190, 190, 195], np.float32)


def _perfboard(d: Draft, pitch: float) -> None:
    """A board with rows of holes, with copper rings or strips."""
    s, rng = d.size, d.design
    form = int(rng.integers(0, 3))
    noise = d.rng(60)
    plane = 1 + 0.03 * grain(noise, s, s) + 0.05 * cloud(noise, s, s, 80 * d.unit, 2)
    d.canvas.fill(
        [box(s / 2, s / 2, 1.1 * s, 1.1 * s)], tint(plane, COPPER * np.float32(0.85) if form == 1 else d.colours[1])
    )
    dark = d.colours[2] * np.float32(0.25)
    start = rng.uniform(0.2, 0.8) * pitch
    ring = COPPER if rng.random() < 0.6 else TIN
    n = int(s / pitch) + 2
    if form == 1:
        for i in range(n):
            d.canvas.fill([box(start + (i - 0.5) * pitch, s / 2, 0.12 * pitch, 1.2 * s)], dark)
    for j in range(n):
        for i in range(n):
            x, y = start + i * pitch, start + (j - 0.5) * pitch
            if form == 0:
                d.canvas.fill([circle(x, y, 0.36 * pitch)], ring)
            d.canvas.fill([circle(x, y, 0.2 * pitch)], dark, bevel=0.8, strength=-1.5, mark=n < 9)


def component(d: Draft) -> None:
    """A package with leads: on a perforated board, or alone."""
    s, rng = d.size, d.design
    on_board = rng.random() < 0.7
    if on_board:
        _perfboard(d, rng.uniform(0.13, 0.24) * s)
    two_sided = rng.random() < 0.45
    n = int(rng.integers(2, 9)) if two_sided else int(rng.choice([2, 3, 3, 3, 4, 5]))
    width = rng.uniform(0.3, 0.55) * s
    height = rng.uniform(0.25, 0.45) * s
    part = d.rng(8)
    x0, y0 = s / 2 + part.normal(0, 0.012) * s, (0.5 if two_sided else 0.36) * s + part.normal(0, 0.012) * s
    package = d.elements([Element(x0, y0, 0.16 * s)], 0.35) if on_board else [Element(x0, y0)]
    if not package:
        return
    x0, y0 = package[0].x, package[0].y
    lead = rng.uniform(0.12, 0.32) * s
    thick = min(rng.uniform(0.018, 0.05) * s, width / n * 0.6)
    spread = rng.uniform(0.7, 1.5)
    colour = TIN * np.float32(rng.uniform(0.6, 1.1))
    leads = []
    for k in range(n):
        along = (k - (n - 1) / 2) * width * 0.85 / max(1, n - 1)
        leads.append(Element(along, 1.0, thick * 3))
        if two_sided:
            leads.append(Element(along, -1.0, thick * 3))
    for e in d.elements(leads):
        side = 1.0 if e.y > 0 else -1.0
        y = y0 + side * height / 2
        reach = lead * abs(e.y) if abs(e.y) > 0.5 else lead
        foot = x0 + e.x * (spread if not two_sided else 1) + e.bend * 0.9 * lead
        points = np.array(
            [
                [x0 + e.x, y - side * 3],
                [x0 + e.x, y + side * 0.3 * reach],
                [foot, y + side * 0.65 * reach],
                [foot + e.bend * 0.5 * lead, y + side * reach * (1 - 0.3 * abs(e.bend))],
            ],
            np.float32,
        )
        d.canvas.shade([box(float(points[2, 0]), float(points[2, 1]), thick, 0.6 * reach)], 0.7, thick * 0.5)
        d.canvas.stroke(points, thick, colour, mark=True)
    level = rng.choice([rng.uniform(15, 50), rng.uniform(15, 60), rng.uniform(150, 230)])
    body = np.clip(level + rng.normal(0, 5, 3), 5, 240).astype(np.float32)
    surface = tint(1 + 0.05 * cloud(d.rng(9), s, s, 40 * d.unit, 2) + 0.02 * grain(d.rng(9), s, s), body)
    shape = (
        [box(x0, y0, width, height, 0, rng.uniform(0, 0.05) * s)]
        if rng.random() < 0.8
        else [circle(x0, y0, width / 2, height / 2)]
    )
    d.canvas.fill(shape, surface, bevel=rng.uniform(1, 4), strength=2, mark=True)
    d.canvas.shade(
        [box(x0 + rng.uniform(-0.3, 0.3) * width, y0, 0.12 * width, 0.9 * height)], rng.uniform(1, 1.7), 0.03 * s
    )
    if rng.random() < 0.5:
        d.canvas.fill(
            [circle(x0 - 0.3 * width, y0 - 0.25 * height, 0.03 * s)], body * np.float32(0.8), bevel=1, strength=-1.5
        )
    if rng.random() < 0.6:
        lettering(d, x0 / s, y0 / s, 0.8 * width / s, rng.uniform(0.04, 0.07), int(rng.integers(1, 3)))


def circuit(d: Draft) -> None:
    """A printed circuit board: traces, vias, pads, chips, small parts, print."""
    s, rng = d.size, d.design
    mask = np.array([[20, 90, 50], [15, 60, 110], [110, 25, 25], [25, 28, 30], [190, 180, 150]], np.float32)[
        int(rng.integers(5))
    ]
    noise = d.rng(60)
    board = tint(
        1 + 0.03 * grain(noise, s, s) + 0.03 * cloud(noise, s, s, 90 * d.unit), mask * np.float32(rng.uniform(0.7, 1.3))
    )
    full = rng.random() < 0.4
    size = 1.2 if full else rng.uniform(0.75, 0.98)
    d.canvas.fill([box(s / 2, s / 2, size * s, size * s * (1 if full else rng.uniform(0.6, 1)), 0, 0.01 * s)], board)
    finish(d, 0.6)
    trace = np.minimum(mask * np.float32(1.45) + 12, 255) if rng.random() < 0.8 else COPPER
    for _ in range(int(rng.integers(6, 26))):  # traces run along the axes with 45 degree bends
        point = rng.uniform(0.1, 0.9, 2) * s
        points = [point]
        for _ in range(int(rng.integers(1, 5))):
            step = np.array([[1, 0], [0, 1], [1, 1], [1, -1], [-1, 0], [0, -1]], float)[int(rng.integers(6))]
            point = np.clip(point + step * rng.uniform(0.04, 0.3) * s, 0.07 * s, 0.93 * s)
            points.append(point)
        line = np.array(points, np.float32)
        width = rng.uniform(0.004, 0.016) * s
        d.canvas.stroke(line, width, trace, gloss=0.05, add=False)
        for end in (line[0], line[-1]):
            d.canvas.fill(
                [circle(float(end[0]), float(end[1]), width * 1.6)], TIN if rng.random() < 0.5 else trace, add=False
            )
            d.canvas.fill([circle(float(end[0]), float(end[1]), width * 0.7)], mask * np.float32(0.3), add=False)
    columns = int(rng.integers(2, 7))
    cell = 0.84 * s / columns
    cells = [(i, j) for j in range(columns) for i in range(columns) if rng.random() < 0.75]
    items = [
        Element(
            0.08 * s + (i + 0.5) * cell,
            0.08 * s + (j + 0.5) * cell,
            0.35 * cell,
            angle=float(rng.integers(2)) * 1.5708,
            seed=int(rng.integers(6)),
        )
        for i, j in cells
    ]
    colours = [
        np.array(c, np.float32)
        for c in ([30, 30, 32], [180, 150, 110], [25, 25, 28], [200, 200, 200], [60, 50, 45], [190, 170, 60])
    ]
    for e in d.elements(items):
        _mounted(d, e, colours[e.seed])
    if rng.random() < 0.6:
        lettering(d, rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.9), 0.4, rng.uniform(0.02, 0.05))


def _mounted(d: Draft, e: Element, colour: np.ndarray) -> None:
    """One part of a circuit board: chip, resistor, capacitor, pads without a part, ring."""
    c, s = np.cos(e.angle), np.sin(e.angle)
    w, h = (1.6 * e.size, 0.8 * e.size) if e.seed in (1, 3, 4) else (1.5 * e.size, 1.5 * e.size)
    if e.seed in (0, 2):
        n = 4
        for k in range(n):
            for side in (-1, 1):
                x, y = side * w * 0.58, (k - (n - 1) / 2) * h * 0.8 / n
                d.canvas.fill(
                    [box(e.x + c * x - s * y, e.y + s * x + c * y, 0.22 * w, 0.1 * h, e.angle)], TIN, bevel=0.7
                )
        d.canvas.shade([box(e.x + 2, e.y + 2, w, h, e.angle)], 0.6, 1.5)
        d.canvas.fill([box(e.x, e.y, w, h, e.angle, 1)], colour, bevel=1.2, strength=2, mark=True)
        d.canvas.fill([circle(e.x - 0.3 * w, e.y - 0.3 * h, 0.07 * w)], colour * np.float32(2), add=False)
    elif e.seed == 5:
        d.canvas.fill([circle(e.x, e.y, 0.55 * e.size), circle(e.x, e.y, 0.28 * e.size)], colour, bevel=1, mark=True)
        d.canvas.fill([circle(e.x, e.y, 0.28 * e.size)], colour * np.float32(0.15), add=False)
    else:
        d.canvas.fill([box(e.x, e.y, 1.25 * w, h * 0.9, e.angle, 1)], TIN, bevel=0.8)
        d.canvas.fill([box(e.x, e.y, 0.8 * w, h, e.angle, 1)], colour, bevel=1.2, strength=2, mark=True)


def connector(d: Draft) -> None:
    """A housing with a row or two of pins."""
    s, rng = d.size, d.design
    n, rows = int(rng.integers(3, 11)), int(rng.integers(1, 3))
    width, height = rng.uniform(0.6, 0.92) * s, rng.uniform(0.25, 0.4) * s
    y0 = 0.42 * s
    shell = d.surface(0)
    d.canvas.fill([box(s / 2, y0, width, height, 0, 0.02 * s)], shell, bevel=2, strength=2)
    d.canvas.fill(
        [box(s / 2, y0, width * 0.9, height * 0.65, 0, 0.01 * s)], shell * np.float32(0.5), bevel=2, strength=-2
    )
    finish(d)
    pitch = width * 0.85 / n
    items = [
        Element(s / 2 + (k - (n - 1) / 2) * pitch, y0 + (r - (rows - 1) / 2) * height * 0.3, 0.25 * pitch, seed=k)
        for r in range(rows)
        for k in range(n)
    ]
    gold = np.array([205, 170, 90], np.float32) if rng.random() < 0.5 else TIN
    long_pins = rng.random() < 0.5
    for e in d.elements(items):
        if long_pins:
            points = np.array([[e.x, e.y], [e.x, e.y + 0.2 * s], [e.x + e.bend * 0.1 * s, e.y + 0.36 * s]], np.float32)
            d.canvas.stroke(points, max(2.0, e.size * 1.2), gold, mark=True)
        else:
            d.canvas.fill([box(e.x + e.bend * e.size, e.y, 2 * e.size, 2 * e.size, e.angle)], gold, bevel=1, mark=True)
            d.canvas.fill([circle(e.x + e.bend * e.size, e.y, 0.5 * e.size)], gold * np.float32(0.35))


def cable(d: Draft) -> None:
    """Wires: a cross-section through several strands, or wires lying side by side."""
    s, rng = d.size, d.design
    tones = [
        *d.colours[:3],
        np.array([40, 40, 45], np.float32),
        np.array([90, 150, 60], np.float32),
        np.array([150, 95, 60], np.float32),
    ]
    n = int(rng.integers(2, 8))
    if rng.random() < 0.5:
        d.canvas.fill([circle(s / 2, s / 2, 0.46 * s)], d.surface(0), bevel=2)
        finish(d)
        ring = (0.0 if n == 1 else 0.24) * s
        r = min(0.2 * s, 0.24 * s * np.sin(np.pi / max(n, 3)) * 0.95)
        start = d.rng(2).uniform(0, 6.28)
        items = [
            Element(
                s / 2 + ring * np.cos(start + 6.283 * k / n), s / 2 + ring * np.sin(start + 6.283 * k / n), r, seed=k
            )
            for k in range(n)
        ]
        core = COPPER if rng.random() < 0.7 else TIN
        for e in d.elements(items):
            d.canvas.fill([circle(e.x, e.y, e.size)], tones[e.seed % 6], bevel=1.5, mark=True)
            jitter = d.rng(100 + e.seed)
            for k in range(19):
                a, q = 2.4 * k, 0.14 * e.size * np.sqrt(k)
                x, y = e.x + q * np.cos(a) + jitter.normal(0, 0.02) * e.size, e.y + q * np.sin(a)
                d.canvas.fill(
                    [circle(float(x), float(y), 0.11 * e.size)], core * np.float32(jitter.uniform(0.8, 1.15)), bevel=0.7
                )
        return
    pitch = 0.8 * s / n
    items = [Element(0.1 * s + (k + 0.5) * pitch, s / 2, 0.6 * pitch, seed=k) for k in range(n)]
    for e in d.elements(items):
        ys = np.linspace(-0.02, 1.02, 14)
        sway = d.rng(100 + e.seed).normal(0, 0.02, 3)
        xs = e.x + s * (sway[0] * np.sin(3 * ys) + sway[1] * np.cos(5 * ys)) + e.bend * e.size * np.sin(np.pi * ys) ** 4
        d.canvas.stroke(
            np.stack([xs, ys * s], 1).astype(np.float32), 0.8 * pitch, tones[e.seed % 6], mark=True, gloss=0.35
        )
