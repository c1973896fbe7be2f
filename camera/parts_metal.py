"""Painters of plates, rings, nuts, gears and castings; edges and lettering for all painters."""

import cv2
import numpy as np

from flawline.camera.noise import emboss
from flawline.camera.scene import Draft, Element, Outline, box, circle, rotate, wavy


def finish(d: Draft, strength: float = 1.0) -> None:
    """Round the object's outer edge with light and shade."""
    width = max(0.8, d.design.uniform(0.002, 0.012) * d.size)
    soft = cv2.GaussianBlur(d.canvas.cover, (0, 0), width) * np.float32(2 * width)
    d.canvas.colour *= emboss(soft, d.canvas.light, strength * d.design.uniform(0.4, 1.6))[:, :, None]


def lettering(d: Draft, x: float, y: float, width: float, height: float, lines: int = 1) -> None:
    """Printed or engraved signs in rows; each sign is an element."""
    s = d.size
    ink = d.colours[int(d.design.integers(1, 3))]
    alphabet = "ABCDEFGHKLMNPRSTUVXYZ0123456789-/."
    per_line = max(2, int(width / (height * 0.62)))
    text = "".join(alphabet[int(k)] for k in d.design.integers(0, len(alphabet), per_line * lines))
    engraved = d.design.random() < 0.3
    face = int(
        d.design.choice(
            [cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_PLAIN]
        )
    )
    items = []
    for k in range(len(text)):
        column, row = k % per_line, k // per_line
        cx = x + (column - per_line / 2 + 0.5) * height * 0.62
        cy = y + (row - lines / 2 + 0.5) * height * 1.5
        items.append(Element(cx, cy, height, seed=k))
    scale = height * s / (12 if face == cv2.FONT_HERSHEY_PLAIN else 22)
    thick = max(1, round(height * s * d.design.uniform(0.05, 0.16)))
    for item in d.elements(items):
        place = (int((item.x - 0.28 * height) * s), int((item.y + 0.45 * height) * s))
        x0, y0 = max(0, place[0] - 3), max(0, int(place[1] - height * s * 1.3))
        x1, y1 = min(d.canvas.w, int(place[0] + height * s + 4)), min(d.canvas.h, int(place[1] + height * s * 0.4))
        if x1 <= x0 or y1 <= y0:
            continue
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.putText(mask, text[item.seed], (place[0] - x0, place[1] - y0), face, scale, 255, thick, cv2.LINE_AA)
        if item.angle:
            centre = ((item.x * s) - x0, (item.y * s) - y0)
            mask = cv2.warpAffine(
                mask, cv2.getRotationMatrix2D(centre, float(np.degrees(item.angle)), 1.0), mask.shape[::-1]
            )
        d.canvas.stamp(
            mask.astype(np.float32) / np.float32(255), ink * np.float32(0.4) if engraved else ink, x0, y0, 0.9
        )


def plate(d: Draft) -> None:
    """A flat plate with holes, notches and sometimes lettering, lying or hanging on a wire."""
    s, rng = d.size, d.design
    w, h = rng.uniform(0.5, 0.95) * s, rng.uniform(0.4, 0.9) * s
    form = rng.random()
    if form < 0.7:
        outline = box(s / 2, s / 2, w, h, 0, float(rng.choice([0, 0, 0.03, 0.1]) * s))
    else:
        n = int(rng.integers(3, 9))
        outline = circle(s / 2, s / 2, w / 2, w / 2, float(rng.uniform(0, 3)), n)
    d.canvas.fill([outline], d.surface(0))
    if rng.random() < 0.25:
        d.canvas.fill(
            [box(s / 2, s / 2, w * 0.75, h * 0.7, 0, 0.03 * s)],
            d.surface(1) if rng.random() < 0.5 else d.colours[1],
            bevel=1.5,
        )
    if rng.random() < 0.3:  # notched corners
        for corner in outline[:: max(1, len(outline) // 4)][: int(rng.integers(1, 4))]:
            d.canvas.cut([circle(float(corner[0]), float(corner[1]), rng.uniform(0.02, 0.06) * s)])
    finish(d)
    layout = int(rng.integers(0, 4))
    r = rng.uniform(0.015, 0.05) * s
    if layout == 0:
        holes = [Element(s / 2, s / 2, 2.2 * r)]
    elif layout == 1:
        holes = [Element(s / 2 + sx * w * 0.36, s / 2 + sy * h * 0.34, r) for sx in (-1, 1) for sy in (-1, 1)]
    elif layout == 2:
        n = int(rng.integers(2, 6))
        holes = [
            Element(s / 2 + (i - (n - 1) / 2) * w * 0.8 / n, s / 2 + (j - 0.5) * h * 0.4, r)
            for i in range(n)
            for j in range(2)
        ]
    else:
        n = int(rng.integers(3, 9))
        ring = rng.uniform(0.15, 0.3) * min(w, h)
        holes = [
            Element(s / 2 + ring * np.cos(6.283 * k / n), s / 2 + ring * np.sin(6.283 * k / n), r * 0.7)
            for k in range(n)
        ]
    slots = rng.random() < 0.25
    for e in d.elements(holes):
        if slots:
            d.canvas.cut([box(e.x, e.y, 3 * e.size, 1.4 * e.size, e.angle, 0.7 * e.size)])
        else:
            d.canvas.cut([circle(e.x, e.y, e.size)])
    if rng.random() < 0.3:
        lettering(d, 0.5, 0.5 + 0.25 * h / s, 0.6 * w / s, rng.uniform(0.03, 0.07))
    if rng.random() < 0.2:  # hangs on a wire that throws a shadow
        x = s / 2 + rng.uniform(-0.1, 0.1) * s
        wire = np.array([[x, 0], [x + 0.01 * s, s / 2 - h / 2 - 0.02 * s], [x + 0.03 * s, s / 2 - 0.1 * h]], np.float32)
        d.canvas.shade([box(x + 0.1 * s, s / 2 - 0.05 * h, 0.25 * s, 0.02 * s, 0.2)], 0.55, 0.008 * s)
        d.canvas.stroke(wire, rng.uniform(0.012, 0.03) * s, d.colours[3], mark=True)


def bracket(d: Draft) -> None:
    """A bent sheet-metal part: two or three lit faces, holes in each."""
    s, rng = d.size, d.design
    surface = d.surface(0)
    fold = rng.uniform(0.35, 0.65)
    width = rng.uniform(0.4, 0.8) * s
    lean = rng.uniform(-0.15, 0.15) * s
    x0, x1 = s / 2 - width / 2, s / 2 + width / 2
    top = np.array([[x0 + lean, 0.08 * s], [x1 + lean, 0.08 * s], [x1, fold * s], [x0, fold * s]], np.float32)
    low = np.array([[x0, fold * s], [x1, fold * s], [x1 + lean, 0.92 * s], [x0 + lean, 0.92 * s]], np.float32)
    d.canvas.fill([top], surface)
    d.canvas.fill([low], surface * np.float32(rng.uniform(0.55, 1.3)))
    if rng.random() < 0.5:
        side = rng.uniform(0.08, 0.15) * s
        d.canvas.fill(
            [
                np.array(
                    [
                        [x1, fold * s],
                        [x1 + side, fold * s - side],
                        [x1 + side + lean, 0.9 * s - side],
                        [x1 + lean, 0.92 * s],
                    ],
                    np.float32,
                )
            ],
            surface * np.float32(0.6),
        )
    finish(d)
    r = rng.uniform(0.03, 0.07) * s
    holes = [
        Element(s / 2 + sx * width * 0.28 + lean * side, (fold + dy) * s, r)
        for sx in (-1, 1)
        for side, dy in ((0.5, -0.2), (0.5, 0.2))
    ]
    for e in d.elements(holes[: int(rng.integers(1, 5))]):
        d.canvas.cut([circle(e.x, e.y, e.size, e.size * 0.8)])


def disc(d: Draft) -> None:
    """A round part with steps, a bore and bolt holes."""
    s, rng = d.size, d.design
    surface = d.surface(0)
    d.canvas.fill([circle(s / 2, s / 2, 0.47 * s)], surface)
    radius = 0.47
    for _ in range(int(rng.integers(0, 4))):
        radius *= rng.uniform(0.6, 0.92)
        paint = surface * np.float32(rng.uniform(0.7, 1.25)) if rng.random() < 0.7 else d.surface(1)
        d.canvas.fill(
            [circle(s / 2, s / 2, radius * s)], paint, bevel=rng.uniform(1, 4), strength=rng.choice([-1.5, 1.5])
        )
    finish(d)
    if rng.random() < 0.6:
        d.canvas.cut([circle(s / 2, s / 2, radius * rng.uniform(0.2, 0.6) * s)])
    n = int(rng.integers(0, 10))
    ring = rng.uniform(0.34, 0.42) * s
    r = rng.uniform(0.015, 0.04) * s
    start = d.rng(3).uniform(0, 6.28)
    for e in d.elements(
        [
            Element(s / 2 + ring * np.cos(start + 6.283 * k / n), s / 2 + ring * np.sin(start + 6.283 * k / n), r)
            for k in range(n)
        ]
    ):
        d.canvas.cut([circle(e.x, e.y, e.size)])


def washer(d: Draft) -> None:
    """A ring: washer, seal or bearing race."""
    s, rng = d.size, d.design
    inner = rng.uniform(0.4, 0.88) * 0.47 * s
    ring = [circle(s / 2, s / 2, 0.47 * s), circle(s / 2, s / 2, inner)]
    d.canvas.fill(ring, d.surface(0), bevel=rng.uniform(0, 1) * (0.47 * s - inner) * 0.25, strength=1.2)
    middle = (0.47 * s + inner) / 2
    if rng.random() < 0.35:  # balls of a bearing
        n = int(rng.integers(7, 16))
        r = min((0.47 * s - inner) * 0.3, middle * 3 / n)
        for e in d.elements(
            [
                Element(s / 2 + middle * np.cos(6.283 * k / n), s / 2 + middle * np.sin(6.283 * k / n), r)
                for k in range(n)
            ]
        ):
            d.canvas.fill([circle(e.x, e.y, e.size)], d.colours[3], bevel=0.4 * r, strength=2, mark=True)
    finish(d)


def nut(d: Draft) -> None:
    """A hexagon or square nut from above, with its thread."""
    s, rng = d.size, d.design
    sides = int(rng.choice([6, 6, 6, 4, 8]))
    face = d.surface(0)
    d.canvas.fill([circle(s / 2, s / 2, 0.47 * s, n=sides, angle=0.3)], face)
    across = 0.47 * s * np.cos(np.pi / sides)
    d.canvas.fill([circle(s / 2, s / 2, rng.uniform(0.88, 1.0) * across)], face * np.float32(1.12), bevel=2)
    bore = rng.uniform(0.45, 0.68) * across
    for k in range(int(rng.integers(2, 6))):
        d.canvas.fill(
            [circle(s / 2, s / 2, bore * (1.12 - 0.05 * k))], d.colours[3] * np.float32(0.35 + 0.5 * (k % 2)), bevel=1
        )
    finish(d)
    d.canvas.cut([circle(s / 2, s / 2, bore * 0.88)])


def gear(d: Draft) -> None:
    """A gear wheel; a tooth may be missing or bent."""
    s, rng = d.size, d.design
    n = int(rng.integers(10, 40))
    depth = rng.uniform(0.1, 0.2)
    root = 0.47 * s * (1 - depth)
    surface = d.surface(0)
    d.canvas.fill([circle(s / 2, s / 2, root * 1.01)], surface)
    pitch = 6.283 / n
    tooth = np.array(
        [
            [root * 0.97, -0.3 * pitch * root],
            [0.47 * s, -0.14 * pitch * root],
            [0.47 * s, 0.14 * pitch * root],
            [root * 0.97, 0.3 * pitch * root],
        ]
    )
    for e in d.elements([Element(0, 0, 0.04 * s, angle=k * pitch) for k in range(n)]):
        d.canvas.fill([rotate(tooth, s / 2 + e.x, s / 2 + e.y, e.angle)], surface, mark=n < 30)
    finish(d)
    d.canvas.fill(
        [circle(s / 2, s / 2, rng.uniform(0.2, 0.35) * s)], surface * np.float32(rng.uniform(0.8, 1.2)), bevel=2
    )
    d.canvas.cut([circle(s / 2, s / 2, rng.uniform(0.06, 0.15) * s)])
    if rng.random() < 0.5:
        k = int(rng.integers(3, 7))
        for i in range(k):
            d.canvas.cut(
                [circle(s / 2 + 0.25 * s * np.cos(6.283 * i / k), s / 2 + 0.25 * s * np.sin(6.283 * i / k), 0.05 * s)]
            )


def casting(d: Draft) -> None:
    """A cast part: rounded outline, bosses, ribs and machined faces."""
    s, rng = d.size, d.design
    surface = d.surface(0)
    outline: Outline = wavy(rng, s / 2, s / 2, 0.38 * s, rng.uniform(0.1, 0.3))
    d.canvas.fill([outline], surface)
    finish(d, 1.6)
    for _ in range(int(rng.integers(0, 3))):
        angle = rng.uniform(0, 3.14)
        d.canvas.fill(
            [box(s / 2, s / 2, 0.5 * s, 0.05 * s, angle, 0.02 * s)], surface * np.float32(1.1), bevel=3, strength=2
        )
    n = int(rng.integers(2, 6))
    start = rng.uniform(0, 6.28)
    bosses = [
        Element(
            s / 2 + 0.23 * s * np.cos(start + 6.283 * k / n),
            s / 2 + 0.23 * s * np.sin(start + 6.283 * k / n),
            0.055 * s,
        )
        for k in range(n)
    ]
    machined = d.colours[3]
    for e in d.elements(bosses):
        d.canvas.fill([circle(e.x, e.y, e.size * 1.3)], surface * np.float32(1.15), bevel=2, mark=True)
        d.canvas.fill([circle(e.x, e.y, e.size)], machined, bevel=1)
        d.canvas.cut([circle(e.x, e.y, e.size * 0.5)])
