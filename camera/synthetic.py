"""Synthetic parts to train and test on: a product is designed, then its parts are drawn, good or with defects."""

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.camera import words
from flawline.camera.defects import GAP, KINDS
from flawline.camera.families import FAMILIES, TRAIN_FAMILIES, UNSEEN_FAMILIES, has_elements
from flawline.camera.noise import Picture
from flawline.camera.optics import Light, expose, record, shine
from flawline.camera.outline import outlined
from flawline.camera.parts import Product, design_product, draw_scene
from flawline.camera.scene import Fault, Scene
from flawline.camera.spot import Spot
from flawline.camera.words import DEFECT_KINDS, STATE_WORDS, UNSEEN_DEFECT_KINDS

__all__ = [
    "DEFECT_KINDS",
    "STATE_WORDS",
    "TRAIN_FAMILIES",
    "UNSEEN_DEFECT_KINDS",
    "UNSEEN_FAMILIES",
    "Product",
    "Sample",
    "choose_product",
    "draw_part",
]

Rng = np.random.Generator
Window = tuple[slice, slice]
FORM_KINDS = ("missing", "bent", "misplaced")  # drawn by the part's own painter
SMALLEST, LARGEST = 0.0002, 0.25  # area of a defect against the picture
VISIBLE = 3.0  # colour difference (CIE 1976): less than that is not labelled
STRIKING = 8.0  # colour difference of a defect's stronger quarter from which on a person sees it; 12 for the smallest
SMALL = 0.001  # area of a defect against the picture, below which it counts as one of the smallest
FAINT = 0.35  # so much of that is enough for a faint defect
LOST_IN_NOISE = 0.3  # colour difference per grey level of noise
_TRIES = 10  # of one kind: faint kinds shall not be rare because they are often drawn too faintly
_KINDS_TRIED = 3


@dataclass
class Sample:
    """One picture of one part and all that is known about it."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    mask: NDArray[np.uint8]  # (H, W), 0 or 255: all defects
    kinds: NDArray[np.uint8]  # (H, W), 0 none, else 1 + index into DEFECT_KINDS
    parts: NDArray[np.uint8]  # (H, W), 0 none, else number of a normal structure (hole, letter, lead, ...)
    object: str
    material: str
    defects: list[tuple[str, tuple[int, int, int, int]]] = field(default_factory=list)  # kind, x y w h

    def caption(self, rng: Rng) -> str:
        """A sentence that says object, material and state."""
        return words.describe(rng, self.object, self.material, [kind for kind, _ in self.defects])


def choose_product(rng: Rng, family: str | None = None, *, families: tuple[str, ...] = TRAIN_FAMILIES) -> Product:
    """Design a product: of `family`, or of one drawn from `families`."""
    return design_product(rng, family if family is not None else families[int(rng.integers(len(families)))])


def draw_part(
    rng: Rng,
    product: Product,
    height: int,
    width: int,
    *,
    defects: int | None = None,
    kinds: tuple[str, ...] | None = None,
    faint: bool = False,
) -> Sample:
    """One part of the product, (height, width).

    `defects` is how many it shall have (left out: none in half of the parts, else one to four); a defect that
    nobody would see is drawn anew, and given up after some tries, so there can be fewer. `faint` keeps what a person
    sees only by looking closely too: who judges by such labels is misled, but who learns from them looks closely.
    `kinds` limits them; left out, all but the unseen kinds are drawn. The light, the noise and the part itself depend
    only on the first number drawn from `rng`: with the same `rng`, the part is the same with and without defects.
    """
    seed = int(rng.integers(2**62))
    light_rng, noise_rng, defect_rng, word_rng = (np.random.default_rng([seed, k]) for k in range(4))
    if defects is None:
        defects = 0 if defect_rng.random() < 0.5 else int(defect_rng.choice([1, 1, 1, 2, 2, 3, 4]))
    allowed = kinds if kinds is not None else tuple(k for k in DEFECT_KINDS if k not in UNSEEN_DEFECT_KINDS)
    scene = draw_scene(product, seed, height, width)
    light = shine(light_rng, product.optics, height, width, float(scene.picture[::8, ::8].mean()))
    work = _Work(product, seed, scene, light, allowed, FAINT if faint else 1.0)
    alike = bool(defect_rng.random() < 0.4)  # a fault of the process leaves its mark more than once
    for _ in range(defects):
        for _ in range(_KINDS_TRIED):
            kind = work.choose(defect_rng, alike)
            if any(work.add(defect_rng, kind) for _ in range(_TRIES)):
                break
    image = record(noise_rng, expose(work.picture, light, product.optics, np.s_[:, :]), product.optics)
    family = FAMILIES[product.family]
    material = words.pick(word_rng, words.MATERIAL_WORDS[product.materials[0].kind])
    mask = np.where(work.kinds > 0, np.uint8(255), np.uint8(0))
    return Sample(image, mask, work.kinds, scene.labels, words.pick(word_rng, family.words), material, work.defects)


class _Work:
    """A scene while defects are added to it."""

    def __init__(
        self, product: Product, seed: int, scene: Scene, light: Light, allowed: tuple[str, ...], clear: float
    ) -> None:
        self.product = product
        self.seed = seed
        self.scene = scene
        self.light = light
        self.picture = scene.picture
        self.kinds: NDArray[np.uint8] = np.zeros(scene.body.shape, np.uint8)
        self.defects: list[tuple[str, tuple[int, int, int, int]]] = []
        self._h, self._w = scene.picture.shape[0], scene.picture.shape[1]
        self._unit = min(self._h, self._w) / 512
        self._allowed = allowed
        self._clear = clear
        material = product.materials[0].kind
        weights = np.array([KINDS[k].chance(material) if k in KINDS else 1.2 for k in self._allowed])
        self._chance = weights / weights.sum()
        self._whole = bool((scene.body > 0.5).all())
        self._formless = set() if has_elements(product.family) else set(FORM_KINDS)

    def choose(self, rng: Rng, alike: bool) -> str:
        """The kind of one more defect: that of the last one if they shall be `alike`."""
        kind = self._allowed[int(rng.choice(len(self._allowed), p=self._chance))]
        return self.defects[-1][0] if alike and self.defects and self.defects[-1][0] in KINDS else kind

    def add(self, rng: Rng, kind: str) -> bool:
        """Try one more defect of this kind. True if it can be seen."""
        if kind in FORM_KINDS:
            return self._change_form(rng, kind)
        recipe = KINDS[kind]
        if recipe.edge and self._whole and rng.random() < 0.5:
            return False
        h, w = self._h, self._w
        area = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(recipe.largest))))
        r = max(1.3, (area * h * w / np.pi) ** 0.5)
        place = self._place(rng, recipe.edge, recipe.free)
        if place is None:
            return False
        y, x = place
        reach = int(recipe.reach * r) + 4
        window = np.s_[max(0, y - reach) : min(h, y + reach + 1), max(0, x - reach) : min(w, x + reach + 1)]
        before = self.picture[window]
        spot = Spot(
            picture=before,
            body=self.scene.body[window],
            under=self.scene.under[window],
            whole=self.picture,
            cx=float(x - window[1].start),
            cy=float(y - window[0].start),
            r=r,
            unit=self._unit,
            light=self.product.optics.direction,
        )
        after = np.clip(recipe.draw(rng, spot), 0, 255).astype(np.float32)
        cover = _fade(window[0], h, 4 + 0.1 * reach)[:, None] * _fade(window[1], w, 4 + 0.1 * reach)[None, :]
        if not recipe.free:
            cover = cover * spot.body
        after = before + (after - before) * cover[:, :, None]
        return self._accept(kind, before, after, window)

    def _place(self, rng: Rng, edge: bool, free: bool) -> tuple[int, int] | None:
        """A pixel of the part, (y, x): on its outline, inside, or, for what may lie anywhere, beside it too."""
        body = self.scene.body
        h, w = body.shape
        if self._whole or (free and rng.random() < 0.15):
            if edge:  # at the picture's border
                return int(rng.integers(h)), int(rng.choice([0, w - 1]))
            return int(rng.integers(h)), int(rng.integers(w))
        small = body[::4, ::4] > 0.5
        if edge:
            small = small & (cv2.erode(small.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0)
        places = np.flatnonzero(small)
        if not len(places):
            return None
        at = int(places[int(rng.integers(len(places)))])
        return min(h - 1, at // small.shape[1] * 4 + 1), min(w - 1, at % small.shape[1] * 4 + 1)

    def _change_form(self, rng: Rng, kind: str) -> bool:
        """Draw the part again with one element missing, bent or misplaced. Only as the first defect."""
        if self.defects or kind in self._formless:
            return False
        fault = Fault(
            kind, float(rng.random()), float(rng.random()), float(rng.uniform(-3.14, 3.14)), float(rng.random())
        )
        scene = draw_scene(self.product, self.seed, self._h, self._w, fault)
        everything: Window = np.s_[0 : self._h, 0 : self._w]
        if self._accept(kind, self.picture, scene.picture, everything):
            self.scene = scene
            return True
        self._formless.add(kind)
        return False

    def _accept(self, kind: str, before: Picture, after: Picture, window: Window) -> bool:
        """Keep the change if a person would see it; the label is the outline that a person would draw."""
        optics = self.product.optics
        plain = colours(expose(before, self.light, optics, window))
        seen = np.linalg.norm(colours(expose(after, self.light, optics, window)) - plain, axis=2)
        changed = (seen > least_difference(seen, optics.noise)).astype(np.uint8)
        size = 3 + 2 * round(self._unit)
        changed = cv2.morphologyEx(changed, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
        h, w = self._h, self._w
        area = int(changed.sum())
        if not max(8, 0.5 * SMALLEST * h * w) <= area <= 1.6 * LARGEST * h * w:
            return False
        wanted = STRIKING if area >= SMALL * h * w else 1.5 * STRIKING
        if kind not in FORM_KINDS:  # a form is seen by what is around it: its own edges are no texture to be lost in
            wanted += _texture(plain, changed, self.scene.body[window]) + LOST_IN_NOISE * optics.noise
        if float(np.percentile(seen[changed > 0], 75)) < self._clear * wanted:
            return False
        if self.picture is self.scene.picture:
            self.picture = self.picture.copy()
        self.picture[window] = after
        outline = outlined(changed, KINDS[kind].gap if kind in KINDS else GAP, min(h, w))
        spot = self.kinds[window]
        spot[(outline > 0) & ((changed > 0) | (spot == 0))] = 1 + DEFECT_KINDS.index(kind)
        x, y, bw, bh = cv2.boundingRect(outline)
        self.defects.append((kind, (window[1].start + x, window[0].start + y, bw, bh)))
        return True


def _fade(span: slice, n: int, width: float) -> NDArray[np.float32]:
    """Along one side of a window: 1 inside, down to 0 at its ends, so that no defect is cut off straight."""
    place = np.arange(span.start, span.stop, dtype=np.float32)
    ramp = np.ones_like(place)
    if span.start > 0:
        ramp = np.minimum(ramp, (place - span.start) / np.float32(width))
    if span.stop < n:
        ramp = np.minimum(ramp, (span.stop - 1 - place) / np.float32(width))
    return ramp


def colours(exposed: Picture) -> Picture:
    """(H, W, 3) RGB, 0 to 255 -> CIE L*a*b*, in which equal distances look about equally far apart."""
    lab: Picture = cv2.cvtColor(exposed * np.float32(1 / 255), cv2.COLOR_RGB2LAB)
    return lab


def least_difference(seen: NDArray[np.float32], noise: float) -> float:
    """The colour difference from which on a pixel belongs to a defect, whose differences are `seen`, (h, w).

    More than the noise of the sensor (standard deviation in grey levels), and a quarter of the defect's own strength:
    nobody would draw the outline of a burn around its faintest haze.
    """
    least = VISIBLE + LOST_IN_NOISE * noise
    clear = seen[seen > least]
    return max(least, 0.25 * float(np.percentile(clear, 95))) if clear.size else least


def _texture(plain: Picture, changed: NDArray[np.uint8], body: NDArray[np.float32]) -> float:
    """How much the colours around a defect differ among themselves: the standard deviation in a ring about it."""
    reach = 2 * int(np.clip(0.5 * float(changed.sum()) ** 0.5, 4, 40)) + 1
    ring = (cv2.dilate(changed, np.ones((reach, reach), np.uint8)) > changed) & (body > 0.5)
    around = plain[ring]
    return float(np.sqrt(around.var(axis=0).sum())) if len(around) >= 30 else 0.0
