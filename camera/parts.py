"""Families of products: which part is drawn by whom, of what, and what it is called."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from flawline.camera import parts_board, parts_metal, parts_more, parts_pack, surfaces, surfaces_more
from flawline.camera.noise import Picture, Plane, cloud
from flawline.camera.optics import Optics, choose_optics
from flawline.camera.scene import Canvas, Draft, Fault, Labels, Outline, Scene
from flawline.camera.textures import Colour, Material, choose_material, grey, vivid

Rng = np.random.Generator
METAL = ("brushed", "ground", "cast", "paint", "brushed", "paint")
SMOOTH = ("plastic", "paint", "brushed")
ANY = ("plastic", "paint", "brushed", "cast", "ground", "wood", "leather", "foam", "paper", "stone", "weave")
BACKGROUNDS = ("plastic", "plastic", "paint", "paper", "brushed", "cast", "wood", "weave", "carpet", "stone", "foam")


@dataclass(frozen=True)
class Family:
    """One kind of product: words for it, the materials it is made of, its painter."""

    words: tuple[str, ...]
    kinds: tuple[str, ...]
    surface: Callable[[Draft], Picture] | None = None  # fills the frame
    shape: Callable[[Draft], None] | None = None  # lies on a background
    palette: str = "any"  # colours: any, metal
    fills: float = 0.0  # share of the designs that fill the picture with one object


def _bare(*words: str, kind: str) -> Family:
    return Family(words, (kind,), surface=surfaces.material, palette="metal" if kind in METAL[:3] else "any")


FAMILIES: dict[str, Family] = {
    "brushed_metal": _bare("brushed metal sheet", "metal surface", "steel plate", kind="brushed"),
    "cast_metal": _bare("cast metal surface", "casting", "rough metal surface", kind="cast"),
    "ground_metal": _bare("machined metal surface", "turned metal face", "metal surface", kind="ground"),
    "wood": _bare("wood", "wooden board", "wood panel", kind="wood"),
    "leather": _bare("leather", "piece of leather", "leather surface", kind="leather"),
    "weave": _bare("woven fabric", "fabric", "cloth", kind="weave"),
    "knit": _bare("knitted fabric", "knitwear", "fabric", kind="knit"),
    "plastic": _bare("plastic surface", "plastic sheet", "moulded plastic", kind="plastic"),
    "paint": _bare("painted surface", "painted metal sheet", "lacquered panel", kind="paint"),
    "stone": _bare("stone slab", "terrazzo", "stone surface", kind="stone"),
    "carpet": _bare("carpet", "felt", "carpet sample", kind="carpet"),
    "paper": _bare("paper", "sheet of paper", "cardboard", kind="paper"),
    "foam": _bare("foam", "sponge", "foam sheet", kind="foam"),
    "mesh": _bare("wire mesh", "grid", "metal grid", kind="mesh"),
    "perforated": _bare("perforated sheet", "perforated metal", "sheet with holes", kind="perforated"),
    "cloth": Family(("cloth", "fabric", "textile", "woven fabric"), ("weave",), surface=surfaces.cloth),
    "tile": Family(("tile", "tiled surface", "ceramic tile"), ("stone", "plastic", "paint"), surface=surfaces.tile),
    "stripes": Family(
        ("striped fabric", "fabric", "striped cloth"), ("weave", "knit", "paper"), surface=surfaces.stripes
    ),
    "pattern": Family(
        ("printed fabric", "printed sheet", "patterned surface"),
        ("weave", "paper", "plastic", "carpet"),
        surface=surfaces.pattern,
    ),
    "braid": Family(("braided rope", "rope", "wicker"), ("weave",), surface=surfaces.braid),
    "thread": Family(
        ("screw thread", "ball screw", "threaded rod", "spindle"),
        ("brushed",),
        surface=surfaces.thread,
        palette="metal",
    ),
    "ribs": Family(("ribbed plate", "heat sink", "corrugated sheet"), (*METAL, "plastic"), surface=surfaces.corrugated),
    "solar": Family(("solar cell", "solar panel", "wafer"), ("plastic", "stone"), surface=surfaces_more.solar),
    "weld": Family(("weld seam", "welded plate", "weld"), METAL, surface=surfaces_more.weld, palette="metal"),
    "marble": Family(("marble slab", "marble", "stone tile"), ("stone",), surface=surfaces_more.marble),
    "planks": Family(("wooden floor", "planks", "parquet"), ("wood",), surface=surfaces_more.planks),
    "grains": Family(("granules", "pellets", "gravel"), ("plastic",), surface=surfaces_more.grains),
    "plate": Family(("metal plate", "plate", "sheet metal part"), METAL, shape=parts_metal.plate),
    "bracket": Family(("metal bracket", "bracket", "metal part"), METAL, shape=parts_metal.bracket),
    "disc": Family(("disc", "metal disc", "round part"), (*METAL, "plastic"), shape=parts_metal.disc),
    "washer": Family(("washer", "metal ring", "ring"), (*METAL, "plastic"), shape=parts_metal.washer),
    "nut": Family(("metal nut", "nut", "hexagon nut"), METAL, shape=parts_metal.nut),
    "gear": Family(("gear", "gear wheel", "cog"), (*METAL, "plastic"), shape=parts_metal.gear),
    "screw": Family(("screw", "bolt", "metal screw"), ("brushed",), shape=parts_metal.screw, palette="metal"),
    "tube": Family(("tube", "pipe", "metal tube"), (*METAL, "plastic"), shape=parts_metal.tube, fills=0.4),
    "casting": Family(
        ("casting", "cast part", "cast metal part"), ("cast", "paint"), shape=parts_metal.casting, palette="metal"
    ),
    "component": Family(
        ("transistor", "electronic component", "chip on a board"), ("plastic",), shape=parts_board.component, fills=0.6
    ),
    "circuit": Family(
        ("circuit board", "printed circuit board", "pcb"), ("plastic", "paint"), shape=parts_board.circuit, fills=0.4
    ),
    "connector": Family(("connector", "plug", "pin connector"), ("plastic",), shape=parts_board.connector),
    "cable": Family(("cable", "cable cross-section", "wire bundle"), ("plastic",), shape=parts_board.cable),
    "spring": Family(("spring", "coil spring", "metal spring"), ("brushed",), shape=parts_more.spring, palette="metal"),
    "lens": Family(("lens", "glass disc", "glass cover"), ("plastic",), shape=parts_more.lens),
    "brush": Family(("toothbrush", "brush"), ("plastic",), shape=parts_more.brush),
    "clip": Family(("metal clip", "wire hook", "bent wire"), ("brushed",), shape=parts_more.clip, palette="metal"),
    "keypad": Family(
        ("keypad", "control panel", "button panel"), ("plastic", "paint"), shape=parts_more.keypad, fills=0.3
    ),
    "box": Family(("carton", "package", "box with a label"), ("paper", "plastic", "paint"), shape=parts_pack.carton),
    "bottle": Family(("bottle", "bottle mouth", "jar"), ("plastic",), shape=parts_pack.bottle),
    "pill": Family(("pill", "tablet"), ("plastic", "paper", "foam"), shape=parts_pack.pill),
    "capsule": Family(("capsule", "softgel"), ("plastic",), shape=parts_pack.capsule),
    "food": Family(("cookie", "nut", "piece of food"), ("foam", "stone", "leather", "wood"), shape=parts_pack.food),
    "zipper": Family(("zipper", "zip fastener"), ("weave",), shape=parts_pack.zipper, fills=0.5),
    "label": Family(
        ("printed label", "label", "name plate"), ("paper", "plastic", "brushed"), shape=parts_pack.label, fills=0.3
    ),
}
UNSEEN_FAMILIES = ("carpet", "mesh", "tile", "braid", "gear", "capsule", "connector", "zipper")
TRAIN_FAMILIES = tuple(name for name in FAMILIES if name not in UNSEEN_FAMILIES)


def has_elements(family: str) -> bool:
    """True if parts of the family have elements that can be missing, bent or misplaced."""
    return FAMILIES[family].shape is not None or family in ("pattern", "solar")


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
        scale=float(1.4 if fills else rng.uniform(0.28, 0.42) if many else np.exp(rng.uniform(-0.55, 0.3))),
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
        under[:] = product.background.colour
        under *= (1 + 0.03 * cloud(rng, max(2, h // 16), max(2, w // 16), 6))[:1, :1, None]
    else:
        under = product.background.render(rng, h, w, unit, product.optics.direction)
        under += (product.background.colour - under) * np.float32(product.plain)
    body = np.zeros((h, w), np.float32)
    labels: Labels = np.zeros((h, w), np.uint8)
    size = int(np.clip(product.scale * min(h, w), 40, 1.4 * min(h, w)))
    places = _places(product, rng, h, w, size)
    wrong = int(rng.integers(len(places)))
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
        corners = _placed(size, size, x, y, angle, 1.0, product.skew, product.design)
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
            spot *= _shadow(cover, depth, product.optics.direction)[:, :, None]
        spot += (colour - spot) * cover[:, :, None]
        np.maximum(body[window], cover, out=body[window])
        labels[window] = np.where(inner > 0, inner, labels[window])
    return Scene(np.clip(picture, 0, 255), body, np.clip(under, 0, 255), labels)


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
