"""Photographs as materials of drawn parts: real wood, stone, cloth, print and panels, on which defects are drawn.

A drawing shows the regularity that its painter thought of; a photograph shows what good surfaces have besides.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import cv2
import numpy as np

from flawline.camera import surfaces
from flawline.camera.families import FAMILIES, TRAIN_FAMILIES
from flawline.camera.noise import Picture
from flawline.camera.parts import Product
from flawline.camera.textures import Material
from flawline.config.errors import ConfigError

Rng = np.random.Generator
SUFFIXES = (".jpg", ".jpeg", ".png")
LEAST_EDGE = 300  # px: what is smaller is an icon
LARGEST_EDGE = 1200  # px, of a photograph as it is used
HELD_OUT = 6  # one of so many is kept for the unseen set, by its contents
AS_SURFACE = 0.5  # of the products are the bare photograph; of the others every material may be one
BARE = tuple(name for name in TRAIN_FAMILIES if FAMILIES[name].surface is surfaces.material)  # show nothing else


@dataclass(frozen=True)
class Photographed(Material):
    """A material that looks like a piece of a photograph."""

    photograph: Path = Path()
    share: float = 1.0  # edge of a piece against the photograph's shorter one, 0 to 1

    def render(self, rng: Rng, h: int, w: int, unit: float, light: tuple[float, float]) -> Picture:
        """Any piece of the photograph in the proportions of (h, w), turned and mirrored at random."""
        whole = _opened(self.photograph)
        height, width = whole.shape[:2]
        fit = self.share * min(height / h, width / w)
        piece_h, piece_w = max(1, int(fit * h)), max(1, int(fit * w))
        y, x = int(rng.integers(0, height - piece_h + 1)), int(rng.integers(0, width - piece_w + 1))
        piece = whole[y : y + piece_h, x : x + piece_w]
        if rng.random() < 0.5:
            piece = piece[:, ::-1]
        if rng.random() < 0.5:
            piece = piece[::-1]
        interpolation = cv2.INTER_AREA if piece_h > h else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(np.ascontiguousarray(piece), (w, h), interpolation=interpolation), np.float32)


@lru_cache(maxsize=64)
def _opened(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(H, W, 3) RGB, not larger than LARGEST_EDGE."""
    data = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if data is None:
        raise ConfigError(f"{file}: not a picture")
    shrink = LARGEST_EDGE / max(data.shape[:2])
    if shrink < 1:
        data = cv2.resize(data, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(data, cv2.COLOR_BGR2RGB), np.uint8)


class Album:
    """The photographs of a folder that are seen in training, or those that are kept from it."""

    def __init__(self, folder: Path, unseen: bool) -> None:
        found: dict[str, Path] = {}
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                found.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
        self.files = [
            file for key, file in sorted(found.items()) if (int(key, 16) % HELD_OUT == 0) == unseen and _large(file)
        ]
        if not self.files:
            raise ConfigError(f"{folder}: no photographs of at least {LEAST_EDGE} px ({', '.join(SUFFIXES)})")

    def dress(self, rng: Rng, product: Product) -> Product:
        """The same product of photographed materials; half of them are nothing but a photographed surface."""
        if rng.random() < AS_SURFACE:
            product = replace(product, family=BARE[int(rng.integers(len(BARE)))])
            return replace(product, materials=(self._pick(rng, product.materials[0]), *product.materials[1:]))
        materials = tuple(
            self._pick(rng, material) if rng.random() < 0.7 else material for material in product.materials
        )
        if rng.random() < 0.5:
            return replace(product, materials=materials)
        background = self._pick(rng, product.background)
        return replace(product, materials=materials, background=background, plain=float(rng.choice([0.0, 0.0, 0.5])))

    def _pick(self, rng: Rng, material: Material) -> Photographed:
        file = self.files[int(rng.integers(len(self.files)))]
        share = 1.0 if rng.random() < 0.25 else float(rng.uniform(0.3, 1.0))
        return Photographed(
            material.kind,
            material.colour,
            material.second,
            material.scale,
            material.strength,
            material.style,
            file,
            share,
        )


open_album = cache(Album)  # a process that draws opens it once, not for every chunk


def _large(file: Path) -> bool:
    data = cv2.imread(str(file), cv2.IMREAD_REDUCED_GRAYSCALE_2)
    return data is not None and 2 * min(data.shape) >= LEAST_EDGE and float(data.std()) > 2.0
