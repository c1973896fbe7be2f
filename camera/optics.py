"""Light and camera of a drawn scene: uneven light, reflections, tone, blur, then noise and compression."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.camera.noise import Picture, Plane, cloud, grain, spread

Rng = np.random.Generator


@dataclass(frozen=True)
class Optics:
    """The set-up of one station: the same for every part of a product."""

    direction: tuple[float, float]  # of the light, unit vector in the picture
    gradient: float
    vignette: float
    patchy: float
    highlight: float  # strength of the additive reflection, grey levels
    band: bool  # the reflection is a band instead of a spot
    place: tuple[float, float]
    cast: tuple[float, float, float]
    mono: bool
    exposure: float
    contrast: float
    blur: float
    specks: int  # of dust on lens or part, too faint to matter
    sharpen: float  # the camera's own edge enhancement
    noise: float
    moire: float
    shadow: float  # depth of a shadow thrown into the picture from outside
    lamps: int  # reflections
    lines: float  # banding of a line-scan camera
    jpeg: int  # 0: none


def choose_optics(rng: Rng) -> Optics:
    """A set-up drawn at random, most of them decent, some poor."""
    angle = rng.uniform(0, 6.28)
    pick = rng.random(7)
    cast = 1 + rng.normal(0, 0.04 if pick[0] < 0.85 else 0.12, 3)
    return Optics(
        direction=(float(np.cos(angle)), float(np.sin(angle))),
        gradient=float(rng.exponential(0.12)),
        vignette=float(rng.uniform(0, 0.5) if pick[1] < 0.35 else 0.0),
        patchy=float(rng.exponential(0.05)),
        highlight=float(rng.uniform(15, 150) if pick[2] < 0.3 else 0.0),
        band=bool(rng.random() < 0.5),
        place=(float(rng.uniform(0, 1)), float(rng.uniform(0, 1))),
        cast=(float(cast[0]), float(cast[1]), float(cast[2])),
        mono=bool(pick[3] < 0.2),
        exposure=float(np.exp(rng.normal(0.0, 0.16))),
        contrast=float(rng.uniform(0.65, 1.3)),
        blur=float(rng.uniform(0.0, 0.65) if pick[4] < 0.75 else rng.uniform(0.65, 1.7)),
        specks=int(rng.integers(5, 60)) if rng.random() < 0.15 else 0,
        sharpen=float(rng.uniform(0.3, 1.2) if rng.random() < 0.2 else 0.0),
        noise=float(rng.uniform(0.5, 3) if pick[5] < 0.75 else rng.uniform(3, 11)),
        moire=float(rng.uniform(0.005, 0.03) if rng.random() < 0.08 else 0.0),
        shadow=float(rng.uniform(0.1, 0.55) if rng.random() < 0.12 else 0.0),
        lamps=int(rng.integers(1, 4)),
        lines=float(rng.uniform(0.005, 0.04) if rng.random() < 0.1 else 0.0),
        jpeg=int(rng.integers(55, 97)) if pick[6] < 0.45 else 0,
    )


@dataclass(frozen=True)
class Light:
    """The light on one part: a factor and an additive reflection, both (H, W, 3)."""

    gain: Picture
    glare: Picture | None


def shine(rng: Rng, optics: Optics, h: int, w: int, level: float) -> Light:
    """Light of one exposure, slightly different every time, (h, w).

    `level` is the scene's mean brightness: like an operator, the light is set so that it is not lost in black or white.
    """
    gh, gw = max(8, h // 8), max(8, w // 8)
    xs = np.linspace(-1, 1, gw, dtype=np.float32)[None, :]
    ys = np.linspace(-1, 1, gh, dtype=np.float32)[:, None]
    gain = 1 + np.float32(optics.gradient) * (xs * optics.direction[0] + ys * optics.direction[1])
    gain = gain * (1 - np.float32(optics.vignette) * 0.5 * (xs * xs + ys * ys))
    gain = gain * (1 + np.float32(optics.patchy) * cloud(rng, gh, gw, max(gh, gw) / 3, 2))
    gain *= np.float32(optics.exposure * np.exp(rng.normal(0, 0.03)) * np.clip(level, 55, 165) / max(level, 8))
    if optics.shadow:
        edge = (
            xs * optics.direction[1]
            - ys * optics.direction[0]
            - np.float32(2 * optics.place[0] - 1 + rng.normal(0, 0.03))
        )
        gain = gain * (
            1 - np.float32(optics.shadow) / (1 + np.exp(np.clip(edge * np.float32(40 * optics.place[1] + 8), -30, 30)))
        )
    cast = np.array(optics.cast, np.float32)
    coloured = cv2.resize(np.maximum(gain, 0.08)[:, :, None] * cast, (w, h), interpolation=cv2.INTER_LINEAR)
    if optics.moire:
        turn = rng.uniform(0, 3.14)
        wave = np.float32(rng.uniform(0.15, 1.2))
        x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
        stripes = np.sin(wave * (x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))))
        coloured *= (1 + np.float32(optics.moire) * stripes)[:, :, None]
    if optics.lines:
        coloured *= (1 + np.float32(optics.lines) * cloud(rng, 1, w, 1.5))[:, :, None]
    if not optics.highlight:
        return Light(coloured, None)
    spot = np.zeros((gh, gw), np.float32)
    for lamp in range(optics.lamps):
        px, py = (2 * ((value * (1 + 0.7 * lamp)) % 1 + rng.normal(0, 0.02)) - 1 for value in optics.place)
        dx, dy = xs - np.float32(px), ys - np.float32(py)
        across = dx * optics.direction[0] + dy * optics.direction[1]
        along = dx * optics.direction[1] - dy * optics.direction[0]
        width = np.float32(0.06 + 0.25 * optics.place[(lamp + 1) % 2])
        if optics.band:
            spot += np.exp(-(across**2) / (width * width)) * (0.8 + 0.2 * cloud(rng, gh, gw, gh / 3))
        else:
            spot += np.exp(-(across**2 + (0.4 + lamp) * along**2) / (width * width))
    glare = cv2.resize(spot.astype(np.float32) * np.float32(optics.highlight), (w, h))
    return Light(coloured, glare[:, :, None] * cast)


def expose(picture: Picture, light: Light, optics: Optics, window: tuple[slice, slice]) -> Picture:
    """What reaches the sensor in `window`, 0 to 255, without noise: light, tone, blur. `picture` is the window's."""
    seen = picture * light.gain[window]
    if light.glare is not None:
        seen += light.glare[window]
    if optics.mono:
        seen = cv2.cvtColor(cv2.cvtColor(seen, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    seen -= np.float32(120)
    seen *= np.float32(optics.contrast)
    seen += np.float32(120)
    np.clip(seen, 0, 255, out=seen)
    if optics.blur > 0.35:
        seen = cv2.GaussianBlur(seen, (0, 0), optics.blur * max(1.0, min(light.gain.shape[:2]) / 512))
    if optics.sharpen:
        seen += np.float32(optics.sharpen) * (seen - cv2.GaussianBlur(seen, (0, 0), 1.2))
        np.clip(seen, 0, 255, out=seen)
    exposed: Picture = seen
    return exposed


def record(rng: Rng, seen: Picture, optics: Optics) -> NDArray[np.uint8]:
    """The picture as delivered, (H, W, 3) uint8: sensor noise, then compression where the station compresses."""
    h, w = seen.shape[:2]
    noise: Plane = grain(rng, h, w) * np.float32(optics.noise)
    if optics.mono or rng.random() < 0.3:
        seen = seen + spread(noise)
    else:
        shared = noise * np.float32(0.7)
        other = grain(rng, h, w) * np.float32(0.7 * optics.noise)
        seen = seen + cv2.merge((shared + other, shared, shared - other))
    if optics.specks:
        ys, xs = rng.integers(0, h, optics.specks), rng.integers(0, w, optics.specks)
        dust = np.zeros((h, w), np.float32)
        dust[ys, xs] = rng.uniform(-60, 60, optics.specks)
        seen = seen + cv2.GaussianBlur(dust, (0, 0), 0.8 + 0.6 * (optics.specks % 3))[:, :, None]
    pixels = np.clip(seen, 0, 255).astype(np.uint8)
    if optics.jpeg:
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, optics.jpeg])[1]
        pixels = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
    return pixels
