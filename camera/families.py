"""Families of products: which part is drawn by whom, of what, and what it is called."""

from collections.abc import Callable
from dataclasses import dataclass

from flawline.camera import parts_board, parts_long, parts_metal, parts_more, parts_pack, surfaces, surfaces_more
from flawline.camera.noise import Picture
from flawline.camera.scene import Draft

METAL = ("brushed", "ground", "cast", "paint", "brushed", "paint")


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
    "screw": Family(("screw", "bolt", "metal screw"), ("brushed",), shape=parts_long.screw, palette="metal"),
    "tube": Family(("tube", "pipe", "metal tube"), (*METAL, "plastic"), shape=parts_long.tube, fills=0.4),
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
