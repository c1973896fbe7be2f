"""Defects of colour and foreign bodies: stains, rust, burns, smears, dirt, hairs, glue, other textures."""

import cv2
import numpy as np

from flawline.camera.noise import Picture, cloud, emboss, grain
from flawline.camera.scene import mask_of, wavy
from flawline.camera.spot import Spot, blob, contrast, curve, line_mask, mix
from flawline.camera.textures import choose_material, vivid

Rng = np.random.Generator
MATERIALS = (
    "brushed",
    "cast",
    "ground",
    "wood",
    "leather",
    "weave",
    "knit",
    "plastic",
    "paint",
    "stone",
    "foam",
    "paper",
    "perforated",
)


def stain(rng: Rng, spot: Spot) -> Picture:
    """A liquid's mark: oil, ink, or water with a darker rim; sometimes several drops."""
    power = contrast(rng)
    cover = blob(
        rng, spot, rough=rng.uniform(0.1, 0.8), soft=rng.choice([0.1, 0.4, 1.0]), stretch=rng.choice([1.0, 1.0, 2.2])
    )
    if rng.random() < 0.35:
        for _ in range(int(rng.integers(1, 5))):
            x, y = spot.cx + rng.normal(0, 0.8) * spot.r, spot.cy + rng.normal(0, 0.8) * spot.r
            cover = np.maximum(
                cover,
                mask_of([wavy(rng, x, y, spot.r * rng.uniform(0.08, 0.3), 0.2, n=20)], cover.shape[0], cover.shape[1]),
            )
    if rng.random() < 0.3:  # water: only the rim is strong
        rim = np.clip(1 - np.abs(cover - 0.5) * 2.2, 0, 1)
        cover = np.maximum(rim, cover * np.float32(0.35))
    tones = [
        spot.mean * np.float32(0.3),
        spot.mean * np.float32(0.55),
        vivid(rng),
        np.array([70, 45, 20], np.float32),
        np.array([245, 245, 240], np.float32),
    ]
    colour = tones[int(rng.choice(5, p=[0.3, 0.2, 0.2, 0.18, 0.12]))]
    return mix(spot.picture, colour.astype(np.float32), cover * np.float32(0.15 + 0.75 * power))


def discoloration(rng: Rng, spot: Spot) -> Picture:
    """The surface keeps its texture and takes another tone."""
    cover = blob(rng, spot, rough=rng.uniform(0.1, 0.9), soft=rng.uniform(0.1, 1.0))
    factor = np.clip(1 + rng.normal(0, 0.35) + rng.normal(0, 0.18, 3), 0.3, 1.8).astype(np.float32)
    return np.clip(spot.picture * (1 + (factor - 1) * cover[:, :, None]), 0, 255)


def rust(rng: Rng, spot: Spot) -> Picture:
    """Orange to dark brown, grainy, with eaten spots; coats flake around it."""
    h, w = spot.body.shape
    cover = blob(rng, spot, rough=rng.uniform(0.4, 1.4), soft=rng.choice([0.12, 0.5]))
    tones = np.array([[150, 75, 30], [110, 60, 30], [175, 105, 45], [80, 50, 32], [120, 95, 55]], np.float32)
    first, second = tones[rng.integers(5)], tones[rng.integers(5)] * np.float32(rng.uniform(0.5, 0.9))
    share = np.clip(0.5 + 0.5 * cloud(rng, h, w, max(3.0, 0.4 * spot.r), 4), 0, 1)[:, :, None]
    colour = (first * share + second * (1 - share)) * np.float32(
        rng.uniform(0.6, 1.3) * np.clip(spot.mean.mean() / 120, 0.6, 1.4)
    )
    colour = colour * (1 + np.float32(0.15) * grain(rng, h, w))[:, :, None]
    colour = (
        colour * emboss(cloud(rng, h, w, max(2.0, 0.12 * spot.r), 2), spot.light, rng.uniform(0.1, 0.7))[:, :, None]
    )
    power = 0.3 + 0.7 * contrast(rng)
    if rng.random() < 0.3:  # speckles
        cover = cover * np.clip(cloud(rng, h, w, max(2.0, 0.15 * spot.r), 2) * 2.5, 0, 1)
    return mix(spot.picture, colour.astype(np.float32), cover * np.float32(power))


def burn(rng: Rng, spot: Spot) -> Picture:
    """Charred in the middle, brown and soft towards the rim."""
    cover = blob(rng, spot, rough=0.4, soft=1.0)
    brown = mix(spot.picture, np.array([95, 60, 30], np.float32), np.clip(cover * 1.6, 0, 0.75))
    return mix(brown, np.array([18, 14, 12], np.float32), np.clip(cover * 1.8 - 0.6, 0, 0.95))


def faded(rng: Rng, spot: Spot) -> Picture:
    """Print or coat worn off: the local pattern gives way to one tone, in patches."""
    cover = blob(rng, spot, rough=rng.uniform(0.3, 1.0), soft=0.3)
    smooth = cv2.GaussianBlur(spot.picture, (0, 0), max(2.0, 0.5 * spot.r))
    smooth = smooth * np.float32(rng.uniform(0.85, 1.25)) + np.float32(rng.uniform(-10, 25))
    worn = np.clip(0.7 + cloud(rng, cover.shape[0], cover.shape[1], max(2.0, 0.25 * spot.r), 2), 0, 1)
    return mix(spot.picture, smooth, cover * worn * np.float32(rng.uniform(0.5, 1)))


def smear(rng: Rng, spot: Spot) -> Picture:
    """Drawn out along one direction: wiped paint, a grease streak, a glue trail."""
    cover = blob(rng, spot, rough=0.5, soft=0.5, stretch=rng.uniform(3, 9))
    power = contrast(rng)
    colour = spot.mean * np.float32(rng.uniform(0.3, 0.8)) if rng.random() < 0.5 else vivid(rng)
    if rng.random() < 0.3:
        colour = np.array([235, 235, 230], np.float32)
    streaky = np.clip(0.6 + 0.5 * cloud(rng, cover.shape[0], cover.shape[1], max(2.0, 0.2 * spot.r), 2), 0, 1)
    return mix(spot.picture, colour.astype(np.float32), cover * streaky * np.float32(0.2 + 0.7 * power))


def foreign(rng: Rng, spot: Spot) -> Picture:
    """A body that does not belong there: crumb, metal chip, insect, dust; it throws a shadow."""
    h, w = spot.body.shape
    form = int(rng.integers(4))
    if form == 0:  # a chip of metal, angular
        n = int(rng.integers(3, 7))
        turn = np.sort(rng.uniform(0, 6.28, n))
        radius = spot.r * rng.uniform(0.5, 1.5, n)
        mask = mask_of(
            [np.stack([spot.cx + radius * np.cos(turn), spot.cy + radius * np.sin(turn)], 1).astype(np.float32)], h, w
        )
        colour = np.full(3, rng.uniform(110, 240), np.float32)
    elif form == 1:  # an insect: body, head, legs
        mask = blob(rng, spot, rough=0.05, soft=0.1, stretch=2.2, scale=0.7)
        for _ in range(6):
            line = curve(
                rng,
                spot.cx + rng.normal(0, 0.2) * spot.r,
                spot.cy + rng.normal(0, 0.2) * spot.r,
                1.9 * spot.r,
                rng.uniform(0, 6.28),
                0.4,
            )
            mask = np.maximum(mask, line_mask(spot, line, max(1.0, 0.07 * spot.r)))
        colour = np.array([40, 28, 22], np.float32) * np.float32(rng.uniform(0.4, 1.6))
    elif form == 2:  # crumbs
        mask = np.zeros((h, w), np.float32)
        for _ in range(int(rng.integers(2, 14))):
            x, y = spot.cx + rng.normal(0, 0.6) * spot.r, spot.cy + rng.normal(0, 0.6) * spot.r
            mask = np.maximum(
                mask, mask_of([wavy(rng, x, y, max(0.9, spot.r * rng.uniform(0.06, 0.4)), 0.4, n=16)], h, w)
            )
        colour = vivid(rng)
    else:
        mask = blob(rng, spot, rough=0.5, soft=0.12, stretch=rng.uniform(1, 2.5))
        colour = vivid(rng)
    depth = max(1.0, 0.15 * spot.r)
    move = np.array([[1, 0, -spot.light[0] * depth], [0, 1, -spot.light[1] * depth]], np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(mask, move, (w, h)), (0, 0), depth * 0.6)
    picture = spot.picture * (1 - np.float32(rng.uniform(0, 0.5)) * shadow)[:, :, None]
    relief = emboss(
        cv2.GaussianBlur(mask, (0, 0), max(0.8, 0.15 * spot.r)) * np.float32(max(1, 0.3 * spot.r)), spot.light, 1.5
    )
    relief = relief * (1 + np.float32(0.08) * cloud(rng, h, w, max(2.0, 0.3 * spot.r), 2))
    return mix(picture, relief[:, :, None] * colour, mask * np.float32(rng.uniform(0.75, 1)))


def hair(rng: Rng, spot: Spot) -> Picture:
    """A hair or fibre that lies in curls."""
    line = curve(rng, spot.cx, spot.cy, spot.r * rng.uniform(4, 7), rng.uniform(0, 6.28), rng.uniform(0.3, 1.3))
    mask = line_mask(spot, line, float(np.clip(0.3 * spot.r, 1, 3.5 * spot.unit + 1)))
    tones = [np.array([25, 20, 18], np.float32), np.array([225, 220, 210], np.float32), vivid(rng)]
    return mix(spot.picture, tones[int(rng.integers(3))], mask * np.float32(0.25 + 0.75 * contrast(rng)))


def glue(rng: Rng, spot: Spot) -> Picture:
    """A drop of glue, resin or solder: clear or milky, raised, glossy."""
    mask = blob(rng, spot, rough=rng.uniform(0.1, 0.5), soft=0.12, stretch=rng.choice([1.0, 1.8]))
    soft = cv2.GaussianBlur(mask, (0, 0), max(0.8, 0.2 * spot.r))
    relief = emboss(soft * np.float32(0.6 * spot.r), spot.light, float(np.exp(rng.uniform(-1.0, 0.8))))
    picture = spot.picture + (spot.picture * relief[:, :, None] - spot.picture) * mask[:, :, None]
    milk = np.clip(
        spot.mean * np.float32(0.4) + np.array([150, 148, 140], np.float32) * np.float32(rng.uniform(0.3, 1)), 0, 255
    )
    picture = mix(picture, milk.astype(np.float32), mask * np.float32(rng.uniform(0.08, 0.6)))
    shine = np.clip(relief - 1.15, 0, 1) * mask
    glossy: Picture = picture + np.float32(rng.uniform(40, 160)) * shine[:, :, None]
    return glossy


def other_texture(rng: Rng, spot: Spot) -> Picture:
    """A patch of another texture with a wild outline at any opacity, as in DRAEM (Zavrtanik 2021, section 3.3)."""
    h, w = spot.body.shape
    design = choose_material(rng, str(rng.choice(MATERIALS)))
    texture = design.render(rng, h, w, spot.unit * rng.uniform(0.4, 1.5), spot.light)
    if rng.random() < 0.5:  # keep the surface's tone, change only its structure
        texture = texture + (spot.mean * np.float32(rng.uniform(0.6, 1.4)) - texture.reshape(-1, 3).mean(0))
    cover = blob(rng, spot, rough=rng.uniform(0.3, 1.6), soft=rng.choice([0.06, 0.3]), stretch=rng.choice([1.0, 2.5]))
    return mix(spot.picture, np.clip(texture, 0, 255), cover * np.float32(rng.uniform(0.2, 1.0)))


def cut_paste(rng: Rng, spot: Spot) -> Picture:
    """A piece of the same picture in the wrong place, also thin scars, as in CutPaste (Li 2021, section 2.1)."""
    h, w = spot.body.shape
    height, width = spot.whole.shape[:2]
    scar = rng.random() < 0.4
    mask = blob(
        rng, spot, rough=rng.uniform(0, 0.5), soft=0.1, stretch=rng.uniform(5, 10) if scar else rng.uniform(1, 2)
    )
    h2, w2 = min(h, height), min(w, width)
    y, x = int(rng.integers(0, height - h2 + 1)), int(rng.integers(0, width - w2 + 1))
    piece = (
        cv2.resize(spot.whole[y : y + h2, x : x + w2], (w, h))
        if (h2, w2) != (h, w)
        else spot.whole[y : y + h, x : x + w]
    )
    turn = float(rng.choice([0, 90, 180, rng.uniform(0, 360)]))
    piece = cv2.warpAffine(
        piece, cv2.getRotationMatrix2D((w / 2, h / 2), turn, 1.0), (w, h), borderMode=cv2.BORDER_REFLECT
    )
    if rng.random() < 0.5:
        piece = piece * np.clip(1 + rng.normal(0, 0.15, 3), 0.6, 1.5).astype(np.float32)
    return mix(spot.picture, np.clip(piece, 0, 255), mask * np.float32(rng.uniform(0.6, 1)))
