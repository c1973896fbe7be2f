"""Full-frame surfaces beyond the bare materials: tiles, prints, stripes, braid, draped cloth, threads of a screw."""

import cv2
import numpy as np

from flawline.camera.noise import Picture, cloud, emboss, grain, tint
from flawline.camera.parts_metal import lettering
from flawline.camera.scene import Draft, Element, box, circle, wavy
from flawline.camera.spot import mix


def material(d: Draft) -> Picture:
    """The first material as it is, sometimes with a seam or panel line, which is normal."""
    picture = d.surface(0)
    if d.design.random() < 0.15:
        _seam(d, picture)
    if d.design.random() < 0.08:
        d.canvas.colour[:] = picture
        height = d.design.uniform(0.03, 0.1)
        lettering(d, d.design.uniform(0.3, 0.7), d.design.uniform(0.2, 0.8), d.design.uniform(0.2, 0.5), height)
        return d.canvas.colour
    return picture


def _seam(d: Draft, picture: Picture) -> None:
    h, w = picture.shape[:2]
    place = d.design.uniform(0.2, 0.8) + d.rng(5).normal(0, 0.01)
    width = max(1, round(d.unit * d.design.uniform(1, 5)))
    dark = d.design.uniform(0.45, 0.85)
    if d.design.random() < 0.5:
        row = int(place * h)
        picture[row : row + width] *= np.float32(dark)
        picture[row + width : row + 2 * width] *= np.float32(1.1)
    else:
        column = int(place * w)
        picture[:, column : column + width] *= np.float32(dark)
        picture[:, column + width : column + 2 * width] *= np.float32(1.1)


def cloth(d: Draft) -> Picture:
    """Fine cloth: hardly visible weave, broad bands along one axis, soft folds."""
    h, w = d.canvas.h, d.canvas.w
    rng = d.rng(1)
    pitch = d.design.uniform(2.2, 5) * max(d.unit, 0.6)
    amount, fold = d.design.uniform(0.01, 0.08), d.design.uniform(0, 0.07)
    xs, ys = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    slant = np.float32(d.design.choice([0.0, 0.0, 1.0]))
    plane = 1 + np.float32(amount) * np.sin((xs + slant * ys) * np.float32(6.28 / pitch)) * np.sin(
        ys * np.float32(6.28 / pitch)
    )
    band = cv2.resize(
        rng.normal(0, d.design.uniform(0, 0.05), (1, int(d.design.integers(4, 40)))).astype(np.float32), (w, 1)
    )
    plane = plane * (1 + band)
    ridge = cloud(rng, h, w, d.design.uniform(60, 160) * d.unit, 2, stretch=d.design.uniform(1, 4))
    plane = plane * (1 + np.float32(fold) * ridge)
    lines = cv2.blur(grain(rng, h, w), (max(3, int(50 * d.unit)), 1)) * 5
    plane = (
        plane
        + np.float32(d.design.uniform(0, 0.04)) * lines
        + np.float32(d.design.uniform(0.01, 0.06)) * grain(rng, h, w)
    )
    picture = tint(plane.astype(np.float32), d.colours[0])
    return np.ascontiguousarray(picture.transpose(1, 0, 2)) if h == w and d.design.random() < 0.5 else picture


def tile(d: Draft) -> Picture:
    """Tiles with grout; every tile has its own tone."""
    h, w = d.canvas.h, d.canvas.w
    picture = d.surface(0)
    nx = int(d.design.integers(2, 8))
    ny = max(1, round(nx * h / w * d.design.uniform(0.5, 2)))
    rng = d.rng(1)
    tones = cv2.resize(
        rng.normal(1, 0.04, (ny + 1, nx + 1)).astype(np.float32),
        (0, 0),
        fx=w / nx,
        fy=h / ny,
        interpolation=cv2.INTER_NEAREST,
    )
    picture *= tones[:h, :w, None]
    grout = d.design.uniform(1.5, 7) * d.unit
    shape = np.zeros((h, w), np.float32)
    ox, oy = rng.uniform(0, w / nx), rng.uniform(0, h / ny)
    for i in range(nx + 1):
        x = int(ox + (i - 1) * w / nx + w / nx * 0.5)
        shape[:, max(0, x) : max(0, x + int(grout) + 1)] = 1
    for j in range(ny + 1):
        y = int(oy + (j - 1) * h / ny + h / ny * 0.5)
        shape[max(0, y) : max(0, y + int(grout) + 1)] = 1
    soft = cv2.GaussianBlur(shape, (0, 0), 0.8 + d.unit)
    picture *= emboss(-soft, d.canvas.light, 1.5)[:, :, None]
    return mix(picture, d.colours[1] * np.float32(0.8), soft)


def stripes(d: Draft) -> Picture:
    """A printed or woven pattern of stripes or checks on the first material."""
    h, w = d.canvas.h, d.canvas.w
    picture = d.surface(0)
    for axis in range(1 + int(d.design.random() < 0.4)):
        n = h if axis else w
        period = int(d.design.uniform(20, 160) * d.unit) + 4
        profile = np.repeat(d.design.integers(0, 2, 8), max(1, period // 8)).astype(np.float32)
        shift = int(d.rng(2 + axis).integers(0, len(profile)))
        line = np.tile(profile, n // len(profile) + 2)[shift : shift + n]
        line = cv2.blur(line[None, :], (3, 1))[0] * np.float32(0.7)
        cover = line[:, None, None] if axis else line[None, :, None]
        picture = picture + (d.colours[1 + axis] - picture) * cover
    return picture


def pattern(d: Draft) -> Picture:
    """A repeated printed motif: dots, rings, leaves or boxes in rows; one may be missing or shifted."""
    h, w = d.canvas.h, d.canvas.w
    d.canvas.colour[:] = d.surface(0)
    d.canvas.cover[:] = 1
    pitch = d.design.uniform(30, 110) * d.unit
    size = pitch * d.design.uniform(0.2, 0.42)
    kind = int(d.design.integers(0, 5))
    stagger = float(d.design.random() < 0.5)
    lift = d.design.uniform(0, 2) * (d.design.random() < 0.4)
    ox, oy = d.rng(1).uniform(0, pitch, 2)
    items = [
        Element(ox + pitch * (i - 1 + 0.5 * stagger * (j % 2)), oy + pitch * (j - 1), size, seed=i * 7 + j)
        for j in range(int(h / pitch) + 3)
        for i in range(int(w / pitch) + 3)
    ]
    inside = [e for e in items if 0 < e.x < w and 0 < e.y < h]
    outside = [e for e in items if not (0 < e.x < w and 0 < e.y < h)]
    motif = wavy(d.design, 0, 0, 1, 0.3)
    for e in outside + d.elements(inside):
        s = e.size
        if kind == 0:
            outline = [circle(e.x, e.y, s)]
        elif kind == 1:
            outline = [circle(e.x, e.y, s), circle(e.x, e.y, s * 0.6)]
        elif kind == 2:
            outline = [box(e.x, e.y, 2 * s, 1.4 * s, e.angle, 0.3 * s)]
        elif kind == 3:
            outline = [(motif * s + [e.x, e.y]).astype(np.float32)]
        else:
            outline = [box(e.x, e.y, 2 * s, 0.5 * s, 0.78 + e.angle), box(e.x, e.y, 0.5 * s, 2 * s, 0.78 + e.angle)]
        d.canvas.fill(outline, d.colours[1], 0.85, bevel=lift, mark=len(inside) < 120)
    return d.canvas.colour


def braid(d: Draft) -> Picture:
    """Rope, braided sleeve or basket: crossing strands with their own shade."""
    h, w = d.canvas.h, d.canvas.w
    rng = d.rng(1)
    pitch = d.design.uniform(16, 60) * d.unit
    slope = d.design.uniform(0.4, 1.4)
    xs = np.arange(w, dtype=np.float32)[None, :] / np.float32(pitch)
    ys = np.arange(h, dtype=np.float32)[:, None] / np.float32(pitch) * np.float32(slope)
    wobble = np.float32(0.06) * cloud(rng, h, w, 50 * d.unit)
    a, b = xs + ys + wobble + np.float32(rng.uniform(0, 9)), xs - ys + wobble + np.float32(rng.uniform(20, 29))
    na, nb = np.floor(a), np.floor(b)
    over = ((na + nb) % 2) < 1
    across = np.where(over, a - na, b - nb) * 2 - 1
    along = np.where(over, b - nb, a - na) * 2 - 1
    plane = (1 - 0.6 * across**2) * (1 - 0.25 * along**2)
    strands = np.sin(across * np.float32(d.design.uniform(4, 12)) + along * 2) * np.float32(d.design.uniform(0, 0.12))
    plane = (plane + strands) * (1 + np.float32(0.06) * grain(rng, h, w))
    first, second = tint(plane.astype(np.float32), d.colours[0]), tint(plane.astype(np.float32), d.colours[1])
    if d.design.random() < 0.6:
        return first
    return np.where(over[:, :, None], first, second)


def thread(d: Draft) -> Picture:
    """A close look at a screw's or spindle's flank: helical ridges of polished metal on a cylinder."""
    h, w = d.canvas.h, d.canvas.w
    rng = d.rng(1)
    across = np.linspace(-1, 1, w, dtype=np.float32)[None, :] * np.float32(d.design.uniform(0.7, 1.15))
    round_ = np.clip(across, -0.98, 0.98)
    turn = np.arcsin(round_)
    pitch = np.exp(d.design.uniform(3.2, 5.2)) * d.unit
    lead = np.float32(d.design.uniform(0.2, 1.3) * d.design.choice([-1, 1]))
    ys = np.arange(h, dtype=np.float32)[:, None] / np.float32(pitch)
    phase = ys + lead * turn * np.float32(0.6) + np.float32(rng.uniform(0, 1))
    phase = phase - np.floor(phase)
    form = int(d.design.integers(0, 3))
    land = d.design.uniform(0.25, 0.55)
    if form == 0:  # V thread
        normal = np.where(phase < 0.5, 1.0, -1.0)
    elif form == 1:  # round groove between flat lands
        normal = np.where(phase < land, 0.0, np.cos((phase - land) / (1 - land) * np.pi) * 1.2)
    else:
        normal = np.sin(phase * 6.2832)
    crease = np.minimum(np.abs(phase), np.abs(phase - (0.5 if form == 0 else land))) * np.float32(pitch)
    groove = np.exp(-((crease / np.float32(d.design.uniform(1, 4) * max(d.unit, 0.5))) ** 2)) * np.float32(
        d.design.uniform(0, 0.6)
    )
    normal = cv2.GaussianBlur(normal.astype(np.float32), (0, 0), 0.7 + d.design.uniform(0, 3) * d.unit)
    lx, ly = d.canvas.light
    gloss = d.design.uniform(0.3, 1.2)
    tilt = np.float32(0.55 * ly if abs(ly) > 0.3 else 0.5) * normal + np.float32(0.5 * lx) * round_
    shade = 0.75 + 0.35 * tilt - np.float32(0.5) * round_**4
    for centre, width in (
        (d.design.uniform(-0.6, 0.6), d.design.uniform(0.06, 0.25)),
        (d.design.uniform(-0.9, 0.9), 0.08),
    ):
        lit = np.exp(-((round_ + 0.25 * normal - np.float32(centre)) ** 2) / np.float32(2 * width * width))
        shade = shade + np.float32(gloss * d.design.uniform(-0.4, 1)) * lit
    length = max(3, int(60 * d.unit))
    marks = cv2.blur(grain(rng, h, w), (length, 1)) * np.float32(length**0.5 * d.design.uniform(0.01, 0.07))
    slant = np.array([[1, 0, 0], [-float(lead) * pitch / w * 1.2, 1, 0]], np.float32)
    marks = cv2.warpAffine(marks, slant, (w, h), borderMode=cv2.BORDER_REFLECT)
    shade = shade * (1 - groove) + marks + np.float32(0.05) * cloud(rng, h, w, 60 * d.unit, 3)
    edge = np.abs(across) > 0.99
    picture = tint(np.clip(shade, 0.06, 1.6).astype(np.float32), d.colours[0])
    if edge.any():
        outside = np.broadcast_to(edge, (h, w))
        picture[outside] = d.colours[1] * 0.6
        d.canvas.cover[:] = np.where(outside, 0, 1)
    return picture


def corrugated(d: Draft) -> Picture:
    """Ribs, slats or a heat sink: parallel raised bars."""
    w = d.canvas.w
    picture = d.surface(0)
    pitch = d.design.uniform(14, 90) * d.unit
    share = d.design.uniform(0.3, 0.8)
    sharp = d.design.uniform(2, 12)
    xs = np.arange(w, dtype=np.float32) / np.float32(pitch) + np.float32(d.rng(1).uniform(0, 1))
    place = np.abs((xs - np.floor(xs)) * 2 - 1)
    rib = 1 / (1 + np.exp(np.clip((place - share) * sharp * 4, -30, 30)))
    slope = np.gradient(rib) * pitch * 0.12 * d.canvas.light[0]
    gain = (0.35 + 0.65 * rib - slope).clip(0.1, 1.6).astype(np.float32)
    picture *= gain[None, :, None]
    return picture
