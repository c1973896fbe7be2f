"""The drawing board of shaped parts: a canvas with cover and labels, outlines, faults of form."""

from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.camera.noise import Picture, Plane, emboss, spread
from flawline.camera.textures import Colour, Material

Labels = NDArray[np.uint8]  # (H, W), 0 background, 1.. instances
Outline = NDArray[np.float32]  # (N, 2) x, y in pixels
Rng = np.random.Generator


@dataclass
class Scene:
    """A part as it lies there, before light and camera."""

    picture: Picture
    body: Plane  # 0 to 1: where the part is
    under: Picture  # what would be seen if the part were not there
    labels: Labels


@dataclass(frozen=True)
class Fault:
    """What is wrong with one element: `missing`, `bent` or `misplaced`, which one, how much (0 to 1)."""

    kind: str
    pick: float
    amount: float
    angle: float
    group: float  # which group of elements, where a part has several


@dataclass(frozen=True)
class Element:
    """A hole, lead, letter, ... of a part: place, size and angle in the painter's own units."""

    x: float
    y: float
    size: float = 1.0
    angle: float = 0.0
    bend: float = 0.0
    seed: int = 0


def circle(x: float, y: float, rx: float, ry: float | None = None, angle: float = 0.0, n: int = 0) -> Outline:
    """A circle, or an ellipse turned by `angle` (radians)."""
    ry = rx if ry is None else ry
    n = n or int(np.clip(max(rx, ry), 12, 72))
    turn = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return rotate(np.stack([rx * np.cos(turn), ry * np.sin(turn)], 1), x, y, angle)


def box(x: float, y: float, w: float, h: float, angle: float = 0.0, corner: float = 0.0) -> Outline:
    """A rectangle with round corners of radius `corner`."""
    corner = min(corner, w / 2, h / 2)
    if corner <= 0.5:
        return rotate(np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2, x, y, angle)
    turn = np.linspace(0, np.pi / 2, 7)
    arc = corner * np.stack([np.cos(turn), np.sin(turn)], 1)
    points = []
    for quarter, (sx, sy) in enumerate([(1, 1), (-1, 1), (-1, -1), (1, -1)]):
        c, s = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter]
        points.append(arc @ np.array([[c, s], [-s, c]]) + [sx * (w / 2 - corner), sy * (h / 2 - corner)])
    return rotate(np.concatenate(points), x, y, angle)


def wavy(rng: Rng, x: float, y: float, r: float, rough: float, stretch: float = 1.0, n: int = 48) -> Outline:
    """A closed blob of mean radius r whose outline wanders by `rough` (0 round, 0.5 wild)."""
    turn = np.linspace(0, 2 * np.pi, n, endpoint=False)
    radius = np.ones(n)
    for k in range(1, 9):
        radius += rough / (k**0.8) * rng.normal(0, 0.5) * np.cos(k * turn + rng.uniform(0, 6.28))
    radius = r * np.clip(radius, 0.25, 2.2)
    points = np.stack([radius * np.cos(turn) * stretch, radius * np.sin(turn) / stretch], 1)
    return rotate(points, x, y, float(rng.uniform(0, 6.28)))


def rotate(points: NDArray[np.floating], x: float, y: float, angle: float) -> Outline:
    """Turn about the origin, then move to (x, y)."""
    c, s = np.cos(angle), np.sin(angle)
    turned: Outline = (points @ np.array([[c, s], [-s, c]]) + [x, y]).astype(np.float32)
    return turned


def mask_of(outlines: list[Outline], h: int, w: int) -> Plane:
    """Coverage 0 to 1 of the outlines, even-odd, with smooth edges, (h, w)."""
    mask = np.zeros((h, w), np.uint8)
    cv2.fillPoly(mask, [np.round(o * 16).astype(np.int32) for o in outlines], 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) * np.float32(1 / 255)


@dataclass
class Canvas:
    """Paint of one object: colour, cover (0 to 1) and labels of its structures, all (H, W)."""

    h: int
    w: int
    light: tuple[float, float]
    colour: Picture = field(init=False)
    cover: Plane = field(init=False)
    labels: Labels = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        self.colour = np.zeros((self.h, self.w, 3), np.float32)
        self.cover = np.zeros((self.h, self.w), np.float32)
        self.labels = np.zeros((self.h, self.w), np.uint8)

    def fill(
        self,
        outlines: list[Outline],
        paint: Picture | Colour,
        opacity: float = 1.0,
        bevel: float = 0.0,
        strength: float = 1.5,
        mark: bool = False,
        add: bool = True,
    ) -> None:
        """Paint an area. `bevel` is the width of its lit edge in pixels, `mark` makes it a labelled structure."""
        x0, y0, x1, y1 = self._window(outlines, 2 + 2 * bevel)
        if x1 <= x0 or y1 <= y0:
            return
        mask = mask_of([o - np.array([x0, y0], np.float32) for o in outlines], y1 - y0, x1 - x0)
        if mark:
            self._mark(mask, x0, y0)
        source = paint[y0:y1, x0:x1] if paint.ndim == 3 else paint
        if bevel > 0:
            relief = emboss(cv2.GaussianBlur(mask, (0, 0), bevel) * np.float32(bevel * 2), self.light, strength)
            source = source * spread(relief)
        if opacity < 1:
            mask = mask * np.float32(opacity)
        self._lay(source, mask, x0, y0, add)

    def _lay(self, source: Picture | Colour, mask: Plane, x0: int, y0: int, add: bool) -> None:
        window = np.s_[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
        spot, cover = self.colour[window], self.cover[window]
        whole = mask + cover * (1 - mask)  # colours are not premultiplied
        change = source - spot
        change *= spread((mask / np.maximum(whole, 1e-3)).astype(np.float32))
        spot += change
        if add:
            cover[:] = whole

    def shade(self, outlines: list[Outline], factor: float, soft: float) -> None:
        """Darken or brighten an area with soft edges (a shadow, a reflection)."""
        x0, y0, x1, y1 = self._window(outlines, 3 * soft + 2)
        if x1 <= x0 or y1 <= y0:
            return
        mask = mask_of([o - np.array([x0, y0], np.float32) for o in outlines], y1 - y0, x1 - x0)
        if soft > 0.3:
            mask = cv2.GaussianBlur(mask, (0, 0), soft)
        self.colour[y0:y1, x0:x1] *= (1 + (factor - 1) * mask)[:, :, None]

    def cut(self, outlines: list[Outline], rim: float = 1.5) -> None:
        """Take an area out of the object: the background shows through, the rim is lit."""
        x0, y0, x1, y1 = self._window(outlines, 4 + 2 * rim)
        if x1 <= x0 or y1 <= y0:
            return
        mask = mask_of([o - np.array([x0, y0], np.float32) for o in outlines], y1 - y0, x1 - x0)
        self._mark(mask, x0, y0)
        relief = emboss(cv2.GaussianBlur(-mask, (0, 0), rim) * np.float32(2 * rim), self.light, 1.5)
        self.colour[y0:y1, x0:x1] *= relief[:, :, None]
        self.cover[y0:y1, x0:x1] *= 1 - mask

    def stroke(
        self, points: Outline, width: float, paint: Colour, mark: bool = False, gloss: float = 0.6, add: bool = True
    ) -> None:
        """A round wire along `points`: dark at its sides, bright along its middle."""
        x0, y0, x1, y1 = self._window([points], width + 2)
        if x1 <= x0 or y1 <= y0:
            return
        path = [np.round((points - np.array([x0, y0], np.float32)) * 16).astype(np.int32)]
        whole: Plane | None = None
        for share, level in ((1.0, 0.55), (0.7, 0.95), (0.3, 1.0 + gloss)):
            mask8 = np.zeros((y1 - y0, x1 - x0), np.uint8)
            cv2.polylines(mask8, path, False, 255, max(1, round(width * share)), cv2.LINE_AA, 4)
            mask = mask8.astype(np.float32) * np.float32(1 / 255)
            if share < 1 and width > 5:
                mask = cv2.blur(mask, (3, 3))
            whole = mask if whole is None else whole
            self._lay(np.minimum(paint * np.float32(level), 255), mask, x0, y0, add)
        if mark and whole is not None:
            self._mark(whole, x0, y0)

    def stamp(self, mask: Plane, paint: Picture | Colour, x0: int, y0: int, opacity: float = 1.0) -> None:
        """Paint a coverage of one's own, (h, w) 0 to 1, with its corner at (x0, y0), as a labelled structure."""
        self._mark(mask, x0, y0)
        self._lay(paint, mask * np.float32(opacity), x0, y0, True)

    def deform(self, fault: Fault) -> None:
        """Bend one end of the object, or break it off along a jagged line."""
        h, w = self.h, self.w
        c, s = float(np.cos(fault.angle)), float(np.sin(fault.angle))
        ys, xs = np.mgrid[:h, :w].astype(np.float32)
        along = (xs - w / 2) * np.float32(c) + (ys - h / 2) * np.float32(s)
        across = (ys - h / 2) * np.float32(c) - (xs - w / 2) * np.float32(s)
        start = np.float32((0.1 + 0.3 * fault.pick) * w)
        if fault.kind == "missing":
            jag = np.sin(across * np.float32(20 / w) + 9 * fault.pick) + 0.5 * np.sin(across * np.float32(57 / w))
            self.cover *= np.clip(start + np.float32(0.02 * w) * jag - along, 0, 1)
            return
        beyond = np.maximum(along - start, 0)
        push = beyond * beyond / np.float32(w) * np.float32((0.8 + 2 * fault.amount) * (1 if fault.pick > 0.5 else -1))
        mx, my = xs + push * np.float32(s), ys - push * np.float32(c)
        self.colour = cv2.remap(self.colour, mx, my, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        self.cover = cv2.remap(self.cover, mx, my, cv2.INTER_LINEAR)
        self.labels = cv2.remap(self.labels, mx, my, cv2.INTER_NEAREST)

    def _window(self, outlines: list[Outline], margin: float) -> tuple[int, int, int, int]:
        low = np.min([o.min(0) for o in outlines], 0) - margin
        high = np.max([o.max(0) for o in outlines], 0) + margin
        return max(0, int(low[0])), max(0, int(low[1])), min(self.w, int(high[0]) + 1), min(self.h, int(high[1]) + 1)

    def _mark(self, mask: Plane, x0: int, y0: int) -> None:
        if self.count < 250:
            self.count += 1
            spot = self.labels[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
            spot[mask > 0.5] = self.count


@dataclass
class Draft:
    """All that the painter of one object needs; coordinates run from 0 to `size` in x and y."""

    design: Rng  # the same numbers for every part of a product
    seed: int  # of this part
    size: int
    unit: float
    materials: tuple[Material, ...]
    colours: tuple[Colour, ...]
    canvas: Canvas
    fault: Fault | None = None

    def rng(self, tag: int) -> Rng:
        """Numbers of this part alone; one stream for each tag, so that a fault elsewhere does not change them."""
        return np.random.default_rng([self.seed, tag])

    def surface(self, index: int, h: int = 0, w: int = 0) -> Picture:
        """The part's own piece of material number `index`, as large as the canvas."""
        h, w = h or self.canvas.h, w or self.canvas.w
        return self.materials[index].render(self.rng(900 + index), h, w, self.unit, self.canvas.light)

    def elements(self, items: list[Element], share: float = 1.0) -> list[Element]:
        """The elements with the part's fault, if it has one, applied to one of them.

        A painter with several groups of elements says which `share` of the faults the first ones take.
        """
        if self.fault is None or not items or self.fault.group > share:
            return items
        fault, self.fault = self.fault, None
        index = int(fault.pick * len(items)) % len(items)
        item = items[index]
        if fault.kind == "missing":
            return items[:index] + items[index + 1 :]
        if fault.kind == "bent":
            sign = 1 if fault.angle > 0 else -1
            changed = replace(item, bend=item.bend + sign * (0.3 + fault.amount), angle=item.angle + sign * 0.25)
        else:
            step = (0.25 + 0.9 * fault.amount) * item.size
            changed = replace(
                item,
                x=item.x + step * float(np.cos(fault.angle)),
                y=item.y + step * float(np.sin(fault.angle)),
                angle=item.angle + (fault.amount - 0.5) * 0.8,
            )
        return [*items[:index], changed, *items[index + 1 :]]
