"""Defects drawn on a part: of form (scratch, crack, dent, chip, ...), each into a window around its place."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from flawline.camera import blemishes
from flawline.camera.noise import Picture, Plane, cloud, emboss, grain
from flawline.camera.scene import Outline, mask_of, wavy
from flawline.camera.spot import Spot, blob, contrast, curve, line_mask, mix

Rng = np.random.Generator
GAP = 0.15  # between the marks of most kinds, as a share of the square root of their area
LINE_GAP = 0.06  # between lines: what lies between two scratches is whole


@dataclass(frozen=True)
class Kind:
    """How a kind of defect is drawn: painter, window's half-size in radii, share of the draws, largest area."""

    draw: Callable[[Rng, Spot], Picture]
    reach: float
    weight: float = 1.0
    largest: float = 0.25
    edge: bool = False  # sits on the part's outline
    free: bool = False  # may lie beside the part as well
    suits: tuple[str, ...] = ()  # materials it is typical of; rarer on all others
    gap: float = GAP  # between its marks, see outline.outlined

    def chance(self, material: str) -> float:
        """Share of the draws on a material."""
        return self.weight if not self.suits or material in self.suits else 0.25 * self.weight


def tone(rng: Rng, spot: Spot, power: float) -> Picture:
    """A colour clearly darker or lighter than the surface at the spot, (3,)."""
    here = spot.mean
    if rng.random() < (0.75 if here.mean() > 110 else 0.35):
        return (here * np.float32(1 - 0.85 * power)).astype(np.float32)
    return (here + (255 - here) * np.float32(0.8 * power)).astype(np.float32)


def scratch(rng: Rng, spot: Spot) -> Picture:
    """One to eight thin lines, straight or curved, dark or bright, often with a raised edge."""
    picture = spot.picture
    many = int(rng.choice([1, 1, 1, 2, 3, 5, 8]))
    base = rng.uniform(0, 6.28)
    power = contrast(rng)
    colour = tone(rng, spot, power)
    length = spot.r * rng.uniform(3.5, 6.5)
    thickest = float(np.exp(rng.uniform(0, 2.2))) * spot.unit + 0.6
    width = float(np.clip(spot.r**2 * 2.2 / length / many**0.5, 0.8, thickest))
    total: Plane = np.zeros(spot.body.shape, np.float32)
    bend = rng.choice([0.02, 0.1, 0.4])
    for _ in range(many):
        angle = base + rng.normal(0, rng.choice([0.05, 0.5]))
        own = length * (1 if many == 1 else rng.uniform(0.3, 1))
        offset = rng.normal(0, 0.5 if many > 1 else 0.05, 2) * spot.r
        line = curve(rng, spot.cx + offset[0], spot.cy + offset[1], own, angle, bend)
        total = np.maximum(total, line_mask(spot, line, width * rng.uniform(0.6, 1.2), taper=rng.random() < 0.7))
    if rng.random() < 0.3:  # broken where it lost contact
        total = total * np.clip(0.6 + cloud(rng, total.shape[0], total.shape[1], max(3, spot.r * 0.4)), 0, 1)
    picture = mix(picture, colour, total, 0.4 + 0.6 * power)
    if rng.random() < 0.5:
        relief = emboss(cv2.GaussianBlur(-total, (0, 0), max(0.7, width * 0.4)), spot.light, 2.5 * power)
        picture = picture * relief[:, :, None]
    return picture


def abrasion(rng: Rng, spot: Spot) -> Picture:
    """A scuffed area: many fine parallel or crossing lines inside a soft outline."""
    mask = blob(rng, spot, rough=0.7, soft=0.6)
    h, w = mask.shape
    side = int(1.5 * max(h, w)) + 2
    length = max(3, int(spot.r * rng.uniform(0.3, 1.2)))
    lines = cv2.blur(grain(rng, side, side), (length, 1)) * np.float32(length**0.5)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), float(rng.uniform(0, 180)), 1.0)
    lines = cv2.warpAffine(lines, turn, (side, side))[(side - h) // 2 :, (side - w) // 2 :][:h, :w]
    cover = mask * np.clip((lines - rng.uniform(-0.3, 0.8)) * 0.9, 0, 1)
    power = contrast(rng)
    return mix(spot.picture, tone(rng, spot, power), cover, power)


def crack(rng: Rng, spot: Spot) -> Picture:
    """A jagged dark line with branches."""
    power = contrast(rng)
    length = spot.r * rng.uniform(3, 5.5)
    thickest = float(np.exp(rng.uniform(0, 2.2))) * spot.unit + 0.6
    width = float(np.clip(spot.r**2 * 1.5 / length, 0.8, thickest))
    angle = rng.uniform(0, 6.28)
    total: Plane = np.zeros(spot.body.shape, np.float32)
    tips = [(spot.cx - np.cos(angle) * length / 2, spot.cy - np.sin(angle) * length / 2, angle, length, width)]
    for _ in range(10):
        if not tips:
            break
        x, y, direction, reach, thick = tips.pop()
        steps = int(np.clip(reach / max(2.0, 3 * spot.unit), 4, 40))
        turns = direction + np.cumsum(rng.normal(0, 0.25, steps)) * 0.5 + rng.normal(0, 0.45, steps)
        stride = reach / steps
        line = np.stack([x + np.cumsum(np.cos(turns)) * stride, y + np.cumsum(np.sin(turns)) * stride], 1).astype(
            np.float32
        )
        total = np.maximum(total, line_mask(spot, line, thick, taper=True))
        for _ in range(int(rng.integers(0, 3))):
            at = int(rng.integers(steps))
            if thick > 0.8:
                tips.append(
                    (
                        line[at, 0],
                        line[at, 1],
                        turns[at] + rng.choice([-1, 1]) * rng.uniform(0.4, 1.1),
                        reach * rng.uniform(0.2, 0.5),
                        thick * 0.7,
                    )
                )
    dark = spot.mean * np.float32(1 - 0.9 * power)
    picture = mix(spot.picture, dark, total, 0.5 + 0.5 * power)
    if rng.random() < 0.5:
        picture = picture * emboss(cv2.GaussianBlur(-total, (0, 0), max(0.8, width * 0.6)), spot.light, 1.5)[:, :, None]
    return picture


def dent(rng: Rng, spot: Spot, sign: float = -1.0) -> Picture:
    """A pressed spot: one side in shade, the other lit; the surface's own texture stays."""
    mask = blob(rng, spot, rough=0.25, soft=0.9, stretch=rng.choice([1.0, 1.0, 2.0]))
    soft = cv2.GaussianBlur(mask, (0, 0), max(0.8, 0.22 * spot.r))
    relief = emboss(sign * soft * np.float32(spot.r), spot.light, float(np.exp(rng.uniform(-1.6, 0.8))))
    picture = spot.picture * relief[:, :, None]
    if rng.random() < 0.4:
        picture = picture + np.float32(rng.uniform(20, 90)) * (np.clip(soft - 0.8, 0, 0.2) * 5)[:, :, None]
    return picture


def bubble(rng: Rng, spot: Spot) -> Picture:
    """A blister: raised, round, with a reflection."""
    picture = dent(rng, spot, 1.0)
    x, y = spot.cx + spot.light[0] * -0.35 * spot.r, spot.cy + spot.light[1] * -0.35 * spot.r
    ys, xs = np.mgrid[: spot.body.shape[0], : spot.body.shape[1]].astype(np.float32)
    glint = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / np.float32(2 * (0.15 * spot.r + 0.5) ** 2))
    return mix(picture, np.full(3, 255, np.float32), glint, rng.uniform(0.2, 0.7))


def _polygon(rng: Rng, spot: Spot, spike: float) -> Plane:
    n = int(rng.integers(4, 11))
    turn = np.sort(rng.uniform(0, 6.28, n))
    radius = spot.r * rng.uniform(1 - spike, 1 + spike, n)
    outline = np.stack([spot.cx + radius * np.cos(turn), spot.cy + radius * np.sin(turn)], 1).astype(np.float32)
    return mask_of([outline], spot.body.shape[0], spot.body.shape[1])


def chip(rng: Rng, spot: Spot) -> Picture:
    """A piece broken off: background or a rough fracture face shows."""
    mask = _polygon(rng, spot, 0.45) if rng.random() < 0.7 else blob(rng, spot, rough=0.4, soft=0.05)
    if rng.random() < 0.55:
        inside = spot.under
        edge = emboss(cv2.GaussianBlur(-mask, (0, 0), 1.2), spot.light, 2.0)
        return mix(spot.picture * edge[:, :, None], inside, mask)
    rough = emboss(
        cloud(rng, mask.shape[0], mask.shape[1], max(2, 0.25 * spot.r), 3), spot.light, rng.uniform(0.5, 1.5)
    )
    face = tone(rng, spot, contrast(rng)) * rough[:, :, None]
    return mix(spot.picture, face, mask)


def hole(rng: Rng, spot: Spot) -> Picture:
    """A hole or cut-out with an edge."""
    mask = blob(rng, spot, rough=rng.uniform(0.05, 0.4), soft=0.08, stretch=rng.choice([1.0, 1.0, 1.7, 3.0]))
    inside = spot.under if rng.random() < 0.4 else spot.mean * np.float32(rng.uniform(0.03, 0.35))
    rim = emboss(cv2.GaussianBlur(-mask, (0, 0), max(0.8, 0.12 * spot.r)) * np.float32(2), spot.light, 1.5)
    picture = spot.picture * rim[:, :, None]
    return mix(picture, inside, mask)


def pitting(rng: Rng, spot: Spot) -> Picture:
    """A cluster of small pits, each dark with a lit rim."""
    total: Plane = np.zeros(spot.body.shape, np.float32)
    n = int(rng.integers(4, 40))
    outlines: list[Outline] = []
    for _ in range(n):
        x, y = spot.cx + rng.normal(0, 0.5) * spot.r, spot.cy + rng.normal(0, 0.35) * spot.r
        outlines.append(wavy(rng, x, y, max(0.8, spot.r * rng.uniform(0.05, 0.25)), 0.4, n=14))
    for outline in outlines:
        total = np.maximum(total, mask_of([outline], total.shape[0], total.shape[1]))
    power = contrast(rng)
    picture = (
        spot.picture * emboss(cv2.GaussianBlur(-total, (0, 0), 1.0) * np.float32(2), spot.light, 2 * power)[:, :, None]
    )
    inside = spot.mean * np.float32(1 - 0.85 * power)
    return mix(picture, inside, total, 0.4 + 0.6 * power)


def wrinkle(rng: Rng, spot: Spot) -> Picture:
    """A fold: a lit and a shaded line side by side, sometimes branching."""
    total: Plane = np.zeros(spot.body.shape, np.float32)
    width = max(1.5, spot.r * rng.uniform(0.2, 0.5))
    angle = rng.uniform(0, 6.28)
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        line = curve(rng, spot.cx, spot.cy, spot.r * rng.uniform(2.5, 4.5), angle + rng.normal(0, 0.4), 0.25)
        total = np.maximum(total, line_mask(spot, line, width, taper=True))
    soft = cv2.GaussianBlur(total, (0, 0), width * 0.5)
    return (
        spot.picture * emboss(soft * np.float32(width), spot.light, float(np.exp(rng.uniform(-1.2, 1.0))))[:, :, None]
    )


def distortion(rng: Rng, spot: Spot) -> Picture:
    """The surface's own pattern drawn out of place: swirled, pinched or sheared."""
    h, w = spot.body.shape
    ys, xs = np.mgrid[:h, :w].astype(np.float32)
    dx, dy = xs - np.float32(spot.cx), ys - np.float32(spot.cy)
    fall = np.clip(1 - (dx * dx + dy * dy) / np.float32((1.3 * spot.r) ** 2), 0, 1) ** 2
    form = int(rng.integers(3))
    if form == 0:
        turn = fall * np.float32(rng.choice([-1, 1]) * rng.uniform(0.6, 2.2))
        mx = spot.cx + dx * np.cos(turn) - dy * np.sin(turn)
        my = spot.cy + dx * np.sin(turn) + dy * np.cos(turn)
    elif form == 1:
        zoom = 1 + fall * np.float32(rng.choice([-0.55, 1.2]) * rng.uniform(0.6, 1))
        mx, my = spot.cx + dx * zoom, spot.cy + dy * zoom
    else:
        angle, push = rng.uniform(0, 6.28), np.float32(rng.uniform(0.3, 0.8) * spot.r)
        mx, my = xs + fall * push * np.float32(np.cos(angle)), ys + fall * push * np.float32(np.sin(angle))
    drawn: Picture = cv2.remap(
        spot.picture, mx.astype(np.float32), my.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return drawn


def fray(rng: Rng, spot: Spot) -> Picture:
    """Loose fibres: a tuft of thin curls in the surface's own tone, over a darkened gap."""
    gap = blob(rng, spot, rough=0.6, soft=0.5, scale=0.6)
    picture = spot.picture * (1 - np.float32(rng.uniform(0.1, 0.75)) * gap)[:, :, None]
    base = rng.uniform(0, 6.28)
    for _ in range(int(rng.integers(4, 16))):
        line = curve(
            rng,
            spot.cx + rng.normal(0, 0.4) * spot.r,
            spot.cy + rng.normal(0, 0.4) * spot.r,
            spot.r * rng.uniform(0.8, 2.2),
            base + rng.normal(0, 0.6),
            0.6,
        )
        fibre = line_mask(spot, line, max(1.0, spot.r * rng.uniform(0.02, 0.07)))
        colour = np.clip(spot.mean * np.float32(rng.uniform(0.6, 1.7)) + np.float32(rng.uniform(0, 30)), 0, 255)
        picture = mix(picture, colour, fibre, 0.9)
    return picture


def thread(rng: Rng, spot: Spot) -> Picture:
    """A pulled, thick, missing or off-colour thread: a straight line along the weave."""
    along_x = rng.random() < 0.5
    length = spot.r * rng.uniform(3, 6.5)
    width = float(np.clip(spot.r**2 * 2 / length, 1.2, 7 * spot.unit + 2))
    line = curve(rng, spot.cx, spot.cy, length, 0.0 if along_x else 1.5708, 0.01)
    mask = line_mask(spot, line, width, taper=rng.random() < 0.5)
    power = contrast(rng)
    picture = (
        spot.picture + (tone(rng, spot, power) - spot.picture) * (mask * np.float32(0.3 + 0.6 * power))[:, :, None]
    )
    if rng.random() < 0.5:
        picture = picture * emboss(mask * np.float32(1.5), spot.light, 1.2)[:, :, None]
    return picture


METALS = ("brushed", "cast", "ground", "paint", "mesh", "perforated")
TEXTILES = ("weave", "knit", "carpet", "leather", "foam", "paper")
KINDS: dict[str, Kind] = {
    "scratch": Kind(scratch, 3.8, 1.6, 0.08, gap=LINE_GAP),
    "abrasion": Kind(abrasion, 1.8, 0.6, gap=0.3),
    "crack": Kind(crack, 3.8, 1.0, 0.06, gap=LINE_GAP),
    "dent": Kind(dent, 1.9, 0.8, 0.12, gap=0.35),
    "bubble": Kind(bubble, 1.9, 0.5, 0.06, gap=0.35),
    "chip": Kind(chip, 1.7, 1.1, edge=True),
    "hole": Kind(hole, 2.2, 0.9, 0.12),
    "pitting": Kind(pitting, 2.2, 1.2, 0.15, suits=(*METALS, "plastic", "stone"), gap=0.2),
    "wrinkle": Kind(wrinkle, 3.0, 1.0, 0.12, suits=TEXTILES, gap=0.3),
    "distortion": Kind(distortion, 1.5, 0.6, 0.15, gap=0.3),
    "fray": Kind(fray, 2.4, 1.1, 0.08, suits=TEXTILES, gap=0.3),
    "thread": Kind(thread, 3.8, 1.4, 0.05, suits=TEXTILES[:3], gap=LINE_GAP),
    "stain": Kind(blemishes.stain, 2.0, 1.3),
    "discoloration": Kind(blemishes.discoloration, 1.9, 0.8),
    "rust": Kind(blemishes.rust, 2.0, 1.6, suits=METALS),
    "burn": Kind(blemishes.burn, 2.2, 0.5),
    "print": Kind(blemishes.faded, 1.9, 0.6),
    "smear": Kind(blemishes.smear, 3.0, 0.6),
    "contamination": Kind(blemishes.foreign, 2.0, 1.3, 0.08, free=True),
    "hair": Kind(blemishes.hair, 3.8, 0.7, 0.03, free=True, gap=LINE_GAP),
    "glue": Kind(blemishes.glue, 2.0, 0.7, 0.12),
    "patch": Kind(blemishes.other_texture, 2.0, 1.4, gap=0.25),
    "irregularity": Kind(blemishes.cut_paste, 2.2, 1.0, gap=0.25),
}
