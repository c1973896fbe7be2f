"""Products and their parts: a design is drawn once, its parts are laid on a background again and again."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from flawline.camera.families import FAMILIES, METAL
from flawline.camera.noise import Picture, Plane, spread
from flawline.camera.optics import Optics, choose_optics
from flawline.camera.scene import Canvas, Draft, Fault, Labels, Outline, Scene, box, circle
from flawline.camera.textures import Colour, Material, choose_material, grey, vivid

Rng = np.random.Generator
BACKGROUNDS = ("plastic", "plastic", "paint", "paper", "brushed", "cast", "wood", "weave", "carpet", "stone", "foam")


@dataclass(frozen=True)
class Product:
    """One design: every part of it has the same form, colours, light and camera, and its own grain and place."""

    family: str
    seed: int
    materials: tuple[Material, ...]
    colours: tuple[Colour, ...]
    optics: Optics
    background: Material
    plain: float  # 0: background with the texture of its material, 1: one colour
    zoom: float  # of textures
    tilt: float  # radians the part is turned by
    loose: bool  # parts lie in any direction
    count: int  # equal objects in one picture
    scale: float  # size of one object against the picture
    skew: float  # perspective

    @property
    def design(self) -> Rng:
        """The product's own numbers, always the same."""
        return np.random.default_rng(self.seed)


def design_product(rng: Rng, family: str) -> Product:
    """A product of the family, drawn from `rng`. Raises KeyError for a family that does not exist."""
    entry = FAMILIES[family]
    kinds = [str(rng.choice(entry.kinds)), str(rng.choice(entry.kinds))]
    metal = entry.palette == "metal" or kinds[0] in METAL[:3]
    first = grey(rng) if metal else vivid(rng)
    ground = choose_material(rng, str(rng.choice(BACKGROUNDS)))
    fills = rng.random() < entry.fills
    many = entry.shape is not None and not fills and rng.random() < 0.14
    if many:
        scale = float(rng.uniform(0.28, 0.42))
    elif fills:
        scale = 1.4
    elif rng.random() < 0.08:  # a close look at some place of the part
        scale = float(rng.uniform(1.4, 2.4))
    else:
        scale = float(np.exp(rng.uniform(-0.55, 0.3)))
    level = rng.choice([rng.uniform(8, 40), rng.uniform(90, 180), rng.uniform(200, 250)])
    if rng.random() < 0.6:
        tone = np.clip(level + rng.normal(0, 6, 3), 3, 252).astype(np.float32)
        ground = Material(ground.kind, tone, vivid(rng), ground.scale, ground.strength, ground.style)
    return Product(
        family=family,
        seed=int(rng.integers(2**62)),
        materials=tuple(choose_material(rng, kind) for kind in kinds),
        colours=(first, vivid(rng), vivid(rng), grey(rng)),
        optics=choose_optics(rng),
        background=ground,
        plain=float(rng.choice([1.0, 0.7, 0.0])),
        zoom=float(np.exp(rng.uniform(-0.6, 0.7))),
        tilt=float(rng.choice([0, 0, 0.5 * np.pi, rng.uniform(0, 6.28)])) * (0.0 if fills else 1.0),
        loose=bool(rng.random() < 0.3) and not fills,
        count=int(rng.integers(2, 7)) if many else 1,
        scale=scale,
        skew=float(abs(rng.normal(0, 0.05)) if rng.random() < 0.5 else 0.0),
    )


def draw_scene(product: Product, seed: int, h: int, w: int, fault: Fault | None = None) -> Scene:
    """The part number `seed` of the product, (h, w), with a fault of its form or without."""
    family = FAMILIES[product.family]
    unit = min(h, w) / 512
    if family.surface is not None:
        return _surface_scene(product, family.surface, seed, h, w, unit * product.zoom, fault)
    assert family.shape is not None
    return _object_scene(product, family.shape, seed, h, w, unit, fault)


def _draft(product: Product, seed: int, h: int, w: int, unit: float, fault: Fault | None) -> Draft:
    canvas = Canvas(h, w, product.optics.direction)
    return Draft(product.design, seed, min(h, w), unit, product.materials, product.colours, canvas, fault)


def _surface_scene(
    product: Product, paint: Callable[[Draft], Picture], seed: int, h: int, w: int, unit: float, fault: Fault | None
) -> Scene:
    turned = product.tilt % 1.57 > 0.01 or product.skew > 0.03
    gh, gw = (int(1.3 * h), int(1.3 * w)) if turned else (h, w)
    draft = _draft(product, seed, gh, gw, unit, fault)
    draft.canvas.cover[:] = 1
    picture = paint(draft)
    body, labels = draft.canvas.cover, draft.canvas.labels
    if turned:
        angle = product.tilt % 0.6 - 0.3 + draft.rng(50).normal(0, 0.01)
        corners = _placed(gw, gh, w / 2, h / 2, angle, 1.0, product.skew, product.design)
        matrix = cv2.getPerspectiveTransform(np.array([[0, 0], [gw, 0], [gw, gh], [0, gh]], np.float32), corners)
        picture = cv2.warpPerspective(picture, matrix, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        body = cv2.warpPerspective(body, matrix, (w, h), borderMode=cv2.BORDER_REFLECT)
        labels = cv2.warpPerspective(labels, matrix, (w, h), flags=cv2.INTER_NEAREST)
    under = np.empty((h, w, 3), np.float32)
    under[:] = product.colours[2] * np.float32(0.3 if product.seed & 1 else 0.8)
    return Scene(np.clip(picture, 0, 255), body, np.clip(under, 0, 255), labels)


def _placed(w: float, h: float, x: float, y: float, angle: float, scale: float, skew: float, rng: Rng) -> Outline:
    """Where the corners of a (h, w) canvas come to lie, (4, 2)."""
    half = np.array([[-w, -h], [w, -h], [w, h], [-w, h]], np.float32) * np.float32(0.5 * scale)
    half = half * (1 + rng.uniform(-skew, skew, (4, 1)))
    c, s = np.cos(angle), np.sin(angle)
    corners = half @ np.array([[c, s], [-s, c]]) + [x, y]
    placed: Outline = corners.astype(np.float32)
    return placed


def _object_scene(
    product: Product, paint: Callable[[Draft], None], seed: int, h: int, w: int, unit: float, fault: Fault | None
) -> Scene:
    rng = np.random.default_rng([seed, 77])
    if product.plain >= 1:
        under = np.empty((h, w, 3), np.float32)
        under[:] = product.background.colour * np.float32(rng.normal(1, 0.02))
    else:
        under = product.background.render(rng, h, w, unit, product.optics.direction)
        under += (product.background.colour - under) * np.float32(product.plain)
    body = np.zeros((h, w), np.float32)
    labels: Labels = np.zeros((h, w), np.uint8)
    size = int(np.clip(product.scale * min(h, w), 40, 1.4 * min(h, w)))
    places = _places(product, rng, h, w, size)
    wrong = int(rng.integers(len(places)))
    if product.seed % 7 == 0:
        _fixture(product, under, unit)
    picture = under.copy()
    depth = product.design.uniform(0, 16) * unit
    for number, (x, y, angle) in enumerate(places):
        own = fault if number == wrong else None
        whole = own if own is not None and own.kind != "misplaced" and own.group > 0.65 else None
        draft = _draft(product, seed + number, size, size, unit * product.zoom**0.5, None if whole else own)
        draft.canvas.count = int(labels.max())
        paint(draft)
        whole = whole or draft.fault
        if whole is not None:
            draft.canvas.deform(whole)
        zoom = max(1.0, product.scale * min(h, w) / size)
        corners = _placed(size, size, x, y, angle, zoom, product.skew, product.design)
        margin = int(3 * depth) + 2
        low, high = corners.min(0).astype(int) - margin, corners.max(0).astype(int) + margin
        x0, y0, x1, y1 = max(0, low[0]), max(0, low[1]), min(w, high[0]), min(h, high[1])
        if x1 - x0 < 2 or y1 - y0 < 2:
            continue
        source = np.array([[0, 0], [size, 0], [size, size], [0, size]], np.float32)
        matrix = cv2.getPerspectiveTransform(source, corners - np.array([x0, y0], np.float32))
        area = (x1 - x0, y1 - y0)
        cover = cv2.warpPerspective(draft.canvas.cover, matrix, area, flags=cv2.INTER_LINEAR)
        colour = cv2.warpPerspective(draft.canvas.colour, matrix, area, flags=cv2.INTER_LINEAR)
        inner = cv2.warpPerspective(draft.canvas.labels, matrix, area, flags=cv2.INTER_NEAREST)
        window = np.s_[y0:y1, x0:x1]
        spot = picture[window]
        if depth > 1.5:
            spot *= spread(_shadow(cover, depth, product.optics.direction))
        colour -= spot
        colour *= spread(cover)
        spot += colour
        np.maximum(body[window], cover, out=body[window])
        labels[window] = np.where(inner > 0, inner, labels[window])
    return Scene(np.clip(picture, 0, 255), body, np.clip(under, 0, 255), labels)


def _fixture(product: Product, under: Picture, unit: float) -> None:
    """What the part lies on or in: rails, a nest, a line on the belt; drawn into `under`."""
    h, w = under.shape[0], under.shape[1]
    rng = product.design
    canvas = Canvas(h, w, product.optics.direction)
    canvas.colour, canvas.cover = under, np.ones((h, w), np.float32)
    tilt = float(rng.choice([0, 0, rng.uniform(-0.5, 0.5)]))
    tone = product.background.colour * np.float32(rng.uniform(0.4, 1.6))
    for _ in range(int(rng.integers(1, 4))):
        x, y, thick = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(2, 60) * unit
        if rng.random() < 0.25:
            r = rng.uniform(0.1, 0.5) * w
            canvas.fill([circle(x, y, r), circle(x, y, max(1.0, r - thick))], tone, bevel=1.5)
        elif rng.random() < 0.5:
            canvas.fill([box(x, h / 2, thick, 2 * h, tilt)], tone, bevel=1.5)
        else:
            canvas.fill([box(w / 2, y, 2 * w, thick, tilt)], tone, bevel=1.5)


def _shadow(cover: Plane, depth: float, light: tuple[float, float]) -> Plane:
    """Factor of brightness around an object that stands `depth` pixels high; the shadow falls away from the light."""
    half = cv2.resize(cover, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    move = np.array([[1, 0, -light[0] * depth / 2], [0, 1, -light[1] * depth / 2]], np.float32)
    shadow = cv2.warpAffine(half, move, half.shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), depth * 0.2 + 0.3)
    factor: Plane = 1 - np.float32(0.45) * cv2.resize(shadow, cover.shape[::-1])
    return factor


def _places(product: Product, rng: Rng, h: int, w: int, size: int) -> list[tuple[float, float, float]]:
    """Centre and angle of every object."""

    def angle() -> float:
        return float(rng.uniform(0, 6.28)) if product.loose else product.tilt + float(rng.normal(0, 0.03))

    if product.count == 1:
        room = 0.25 if product.scale < 0.7 else 0.04
        spread = room * min(h, w) * (0.4 if product.loose else 0.12)
        if product.scale > 1.4:
            spread = 0.3 * (product.scale - 1) * min(h, w)
        return [(w / 2 + float(rng.normal(0, spread)), h / 2 + float(rng.normal(0, spread)), angle())]
    columns = max(1, min(product.count, round(w / size / 1.05)))
    rows = max(1, min(-(-product.count // columns), round(h / size / 1.05)))
    places: list[tuple[float, float, float]] = []
    for j in range(rows):
        for i in range(columns):
            if len(places) < product.count:
                x = (i + 0.5) * w / columns + rng.normal(0, 0.02 * size)
                y = (j + 0.5) * h / rows + rng.normal(0, 0.02 * size)
                places.append((float(x), float(y), angle()))
    return places
