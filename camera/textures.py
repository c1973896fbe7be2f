"""Materials of drawn parts: metal, wood, leather, cloth, plastic and more, as textures without end."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.camera.noise import Picture, Plane, cloud, emboss, grain, tint

Rng = np.random.Generator
Colour = NDArray[np.float32]  # (3,) RGB, 0 to 255


@dataclass(frozen=True)
class Material:
    """One design of a material: its kind, colours and proportions are fixed, its grain is drawn anew each time."""

    kind: str
    colour: Colour
    second: Colour
    scale: float  # size of its structure, 0 fine to 1 coarse
    strength: float  # contrast of its structure, 0 weak to 1 strong
    style: float  # free proportion, 0 to 1

    def render(self, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
        """The bare surface, (h, w, 3) RGB 0 to 255; `unit` is one pixel of a 512 px picture in real pixels."""
        return _RENDERERS[self.kind](self, rng, h, w, unit, light)


def grey(rng: Rng, low: float = 60, high: float = 215, tone: float = 8) -> Colour:
    """A metal's colour: grey with a little tone."""
    return np.clip(rng.uniform(low, high) + rng.normal(0, tone, 3), 5, 250).astype(np.float32)


def vivid(rng: Rng, dark: float = 20, bright: float = 230) -> Colour:
    """Any colour, often saturated."""
    level = rng.uniform(dark, bright)
    colour: Colour = np.clip(level + rng.normal(0, 1, 3) * rng.choice([6, 25, 60], p=[0.6, 0.22, 0.18]), 5, 250).astype(
        np.float32
    )
    return colour


def choose_material(rng: Rng, kind: str) -> Material:
    """A design of the given kind, drawn from `rng`."""
    colour, second = _PALETTES.get(kind, _any_palette)(rng)
    return Material(kind, colour, second, *(float(value) for value in rng.uniform(0, 1, 3)))


def _any_palette(rng: Rng) -> tuple[Colour, Colour]:
    return vivid(rng), vivid(rng)


def _metal_palette(rng: Rng) -> tuple[Colour, Colour]:
    if rng.random() < 0.25:  # brass, copper, anodised
        base = np.array([[190, 150, 80], [180, 115, 80], [150, 160, 180], [90, 110, 150]], np.float32)
        return (base[rng.integers(4)] * rng.uniform(0.6, 1.15)).clip(5, 245), grey(rng)
    return grey(rng), grey(rng)


def _wood_palette(rng: Rng) -> tuple[Colour, Colour]:
    light = np.array([rng.uniform(140, 225), rng.uniform(100, 175), rng.uniform(60, 130)], np.float32)
    return light, (light * rng.uniform(0.5, 0.85)).astype(np.float32)


def _leather_palette(rng: Rng) -> tuple[Colour, Colour]:
    tones = np.array([[120, 75, 45], [60, 45, 38], [150, 110, 80], [35, 35, 38], [130, 40, 40]], np.float32)
    return (tones[rng.integers(5)] * rng.uniform(0.7, 1.3)).clip(8, 235), vivid(rng)


def _brushed(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    noise = grain(rng, h, w)
    length = int((40 + 300 * m.scale) * unit)
    streaks = cv2.blur(noise, (max(3, length), 1)) * np.float32(np.sqrt(max(3, length)))
    fine = cv2.blur(noise[::-1], (max(3, length // 6), 1)) * np.float32(np.sqrt(max(3, length // 6)))
    plane = 1 + (0.02 + 0.10 * m.strength) * (0.6 * streaks + 0.4 * fine) + 0.03 * cloud(rng, h, w, 220 * unit)
    if m.style > 0.6:
        plane = cv2.resize(np.ascontiguousarray(plane.T), (w, h)) if h != w else plane.T
    return tint(np.ascontiguousarray(plane), m.colour)


def _cast(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    height = cloud(rng, h, w, (2 + 9 * m.scale**2) * unit, 2)
    plane = emboss(height, light, 0.12 + 0.7 * m.strength) * (1 + 0.08 * cloud(rng, h, w, 120 * unit, 2))
    plane += (0.02 + 0.05 * m.style) * grain(rng, h, w)
    return tint(plane, m.colour)


def _ground(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    reach = m.style * 3.0  # centre inside the picture: turned on a lathe; far outside: ground in arcs
    centre = (w * (0.5 + reach * np.cos(m.scale * 6.28)), h * (0.5 + reach * np.sin(m.scale * 6.28)))
    xs = (np.arange(w, dtype=np.float32) - np.float32(centre[0]))[None, :]
    ys = (np.arange(h, dtype=np.float32) - np.float32(centre[1]))[:, None]
    squared = xs * xs + ys * ys
    radius = np.sqrt(squared)
    profile = cv2.GaussianBlur(rng.standard_normal((1, 8192), dtype=np.float32), (0, 0), 0.8 + 1.2 * m.scale)[0]
    profile += 0.5 * np.convolve(rng.standard_normal(8192), np.ones(24) / 8, "same").astype(np.float32)
    index = (radius * np.float32(1 / unit)).astype(np.int32) & 8191
    plane = 1 + (0.03 + 0.10 * m.strength) * profile[index]
    if reach < 0.4:  # the bow-tie highlight of turned faces
        plane += 0.18 * m.strength * (xs * xs - ys * ys) / (squared + 1)
    plane += 0.02 * grain(rng, h, w)
    return tint(plane, m.colour)


def _wood(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    bend = cloud(rng, h, w, 160 * unit, 2, stretch=3)
    ys = np.arange(h, dtype=np.float32)[:, None] / np.float32(unit)
    rings = np.sin(ys * np.float32(0.05 + 0.25 * m.scale) + bend * np.float32(1 + 3 * m.style))
    rings = rings * rings * np.sign(rings) * 0.5 + 0.5
    fibre = cv2.blur(grain(rng, h, w), (max(3, int(31 * unit)), 1)) * 5
    mix = np.clip(rings * (0.25 + 0.6 * m.strength) + 0.10 * fibre, 0, 1)
    board: Picture = m.colour * (1 - mix[:, :, None]) + m.second * mix[:, :, None]
    return board


def _leather(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    cell = (5 + 12 * m.scale) * unit
    ridges = np.minimum(np.abs(cloud(rng, h, w, cell)), np.abs(cloud(rng, h, w, cell * 1.4)))
    ridges = np.minimum(ridges, np.float32(0.6)).astype(np.float32)
    relief = emboss(ridges, light, 0.8 + 1.2 * m.strength)
    plane: Plane = (relief * (0.85 + 0.35 * ridges)).astype(np.float32)
    plane *= 1 + 0.06 * cloud(rng, h, w, 150 * unit, 2)
    return tint(plane, m.colour)


def _threads(rng: Rng, n: int, unit: float, pitch: float) -> tuple[NDArray[np.int32], Plane, Plane]:
    """Along one axis of n pixels: number of the thread, place across it in [-1, 1], its own brightness."""
    place = np.arange(n, dtype=np.float32) / np.float32(pitch * unit) + np.float32(rng.uniform(0, 9))
    number = place.astype(np.int32)
    own = rng.normal(0, 1, int(number[-1]) + 2).astype(np.float32)[number]
    return number, (place - number) * 2 - 1, own


def _weave(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    pitch = 3.5 + 14 * m.scale**2
    ny, fy, oy = _threads(rng, h, unit, pitch)
    nx, fx, ox = _threads(rng, w, unit, pitch * (0.7 + 0.6 * m.strength))
    period, over = [(2, 1), (2, 1), (4, 2), (3, 2), (5, 4)][int(m.style * 4.99)]
    warp_on_top = ((nx[None, :] + ny[:, None] * (2 if period == 5 else 1)) % period) < over
    round_x = (1 - 0.55 * fx * fx)[None, :] * (1 - 0.2 * fy * fy)[:, None] * (1 + 0.06 * ox)[None, :]
    round_y = (1 - 0.55 * fy * fy)[:, None] * (1 - 0.2 * fx * fx)[None, :] * (1 + 0.06 * oy)[:, None]
    noise = 1 + 0.07 * grain(rng, h, w) + 0.05 * cloud(rng, h, w, 90 * unit, 2)
    second = m.colour * (0.75 + 0.4 * m.strength) if m.scale < 0.7 else m.second
    first = tint(round_x.astype(np.float32) * noise, m.colour)
    other = tint(round_y.astype(np.float32) * noise, second.astype(np.float32))
    return np.where(warp_on_top[:, :, None], first, other)


def _knit(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    pitch = (9 + 22 * m.scale) * unit
    xs = np.arange(w, dtype=np.float32) / np.float32(pitch)
    ys = np.arange(h, dtype=np.float32)[:, None] / np.float32(pitch * 0.8)
    column = xs - np.floor(xs)
    slant = np.abs(column * 2 - 1)
    wobble = 0.12 * cloud(rng, h, w, 60 * unit)
    loops = np.sin((ys + slant[None, :] * 0.8 + wobble) * 6.2832)
    plane = 0.78 + 0.22 * loops - 0.25 * (np.abs(slant - 0.5) > 0.42)[None, :]
    plane = plane.astype(np.float32) + 0.06 * grain(rng, h, w)
    return tint(plane, m.colour)


def _plastic(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    plane = 1 + 0.04 * m.strength * cloud(rng, h, w, 200 * unit, 2)
    if m.style > 0.5:  # moulded grain
        plane = plane * emboss(cloud(rng, h, w, (2 + 5 * m.scale) * unit), light, 0.10 + 0.35 * m.strength)
    plane += (0.005 + 0.02 * m.scale) * grain(rng, h, w)
    return tint(plane, m.colour)


def _paint(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    plane = emboss(cloud(rng, h, w, (8 + 14 * m.scale) * unit), light, 0.05 + 0.2 * m.strength)
    if m.style > 0.6:  # metallic flakes
        plane = plane + 0.05 * cv2.GaussianBlur(grain(rng, h, w), (3, 3), 0)
    plane += 0.04 * cloud(rng, h, w, 250 * unit)
    return tint(plane, m.colour)


def _stone(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    cell = (6 + 26 * m.scale) * unit
    spots = cloud(rng, h, w, cell, 2) > 0.9 + 0.5 * m.style
    dark = cloud(rng, h, w, cell * 0.6) > 1.3
    plane = 1 + 0.10 * m.strength * cloud(rng, h, w, 40 * unit, 3) + 0.04 * grain(rng, h, w)
    picture = tint(plane, m.colour)
    picture[spots] = picture[spots] * 0.4 + m.second * 0.6
    picture[dark] *= np.float32(0.55 + 0.3 * m.style)
    return picture


def _carpet(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    tufts = cv2.GaussianBlur(grain(rng, h, w), (0, 0), (0.8 + 2.2 * m.scale) * unit) * np.float32(2.5 * unit)
    plane = 1 + (0.10 + 0.15 * m.strength) * tufts * np.float32(1 + m.scale) + 0.05 * cloud(rng, h, w, 90 * unit, 2)
    picture = tint(plane, m.colour)
    if m.style > 0.6:
        fleck = cloud(rng, h, w, 3 * unit) > 1.2
        picture[fleck] = picture[fleck] * 0.5 + m.second * 0.5
    return picture


def _paper(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    colour = (255 - (255 - m.colour) * 0.35).astype(np.float32)
    plane = 1 + 0.02 * cloud(rng, h, w, 30 * unit, 3) + 0.015 * grain(rng, h, w)
    return tint(plane, colour)


def _foam(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    pores = cloud(rng, h, w, (3 + 6 * m.scale) * unit)
    plane = 1 - (0.15 + 0.3 * m.strength) * (pores > 1.0 + 0.6 * m.style) + 0.04 * grain(rng, h, w)
    return tint(cv2.GaussianBlur(plane.astype(np.float32), (3, 3), 0), m.colour)


def _mesh(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    pitch = 18 + 40 * m.scale
    _, fy, _ = _threads(rng, h, unit, pitch)
    _, fx, _ = _threads(rng, w, unit, pitch)
    width = 0.18 + 0.3 * m.style
    wire_y = np.clip(1 - (fy / width) ** 2, 0, 1)[:, None]
    wire_x = np.clip(1 - (fx / width) ** 2, 0, 1)[None, :]
    wires = np.sqrt(np.maximum(wire_x, wire_y)).astype(np.float32) * (1 + 0.05 * grain(rng, h, w))
    back = tint(1 + 0.05 * cloud(rng, h, w, 120 * unit), m.second * 0.5)
    cover = np.clip(wires * 3, 0, 1)[:, :, None]
    picture: Picture = back * (1 - cover) + tint(0.35 + 0.75 * wires, m.colour) * cover
    return picture


def _perforated(m: Material, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
    pitch = 20 + 50 * m.scale
    ny, fy, _ = _threads(rng, h, unit, pitch)
    xs = np.arange(w, dtype=np.float32)[None, :] / np.float32(pitch * unit)
    if m.style > 0.5:
        xs = xs + 0.5 * (ny % 2)[:, None]
    fx = (xs - np.floor(xs)) * 2 - 1
    distance = np.sqrt(fx * fx + (fy * fy)[:, None]) - (0.3 + 0.45 * m.strength)
    hole = np.clip(0.5 - distance * pitch * 0.3, 0, 1).astype(np.float32)
    sheet = 1 + 0.04 * grain(rng, h, w) + 0.04 * cloud(rng, h, w, 150 * unit)
    sheet = sheet * emboss(hole, light, 1.2)
    back = (m.second * 0.3).astype(np.float32)
    pierced: Picture = tint(sheet, m.colour) * (1 - hole[:, :, None]) + back * hole[:, :, None]
    return pierced


_Renderer = Callable[[Material, Rng, int, int, float, tuple[float, float]], Picture]
_RENDERERS: dict[str, _Renderer] = {
    "brushed": _brushed,
    "cast": _cast,
    "ground": _ground,
    "wood": _wood,
    "leather": _leather,
    "weave": _weave,
    "knit": _knit,
    "plastic": _plastic,
    "paint": _paint,
    "stone": _stone,
    "carpet": _carpet,
    "paper": _paper,
    "foam": _foam,
    "mesh": _mesh,
    "perforated": _perforated,
}
_PALETTES: dict[str, Callable[[Rng], tuple[Colour, Colour]]] = {
    "brushed": _metal_palette,
    "cast": _metal_palette,
    "ground": _metal_palette,
    "mesh": _metal_palette,
    "perforated": _metal_palette,
    "wood": _wood_palette,
    "leather": _leather_palette,
}
