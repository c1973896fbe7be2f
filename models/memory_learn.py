"""Learning a memory: good parts are described and collected, outliers left out, and the rest becomes the memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ConfigError, ImageError
from flawline.config.recipe import Recipe
from flawline.models.coreset import BUDGET, Scores, farthest_layout, leave_one_out, outliers
from flawline.models.decide import counted_region
from flawline.models.descriptors import descriptors, layout, projection
from flawline.models.evidence import Encoded
from flawline.models.frames import as_rgb
from flawline.models.good_parts import MOST_GOOD_PARTS
from flawline.models.inspector import Inspector
from flawline.models.memory import About, Memory, logit, placed
from flawline.models.memory_file import make_memory, words_sha256
from flawline.models.registration import Registration
from flawline.models.tiles import Tile

PLACE = 3.0
"""Weight of a place in the frame, where parts always lie alike: a tenth of the frame away is as a cosine of 0.955."""
FIXTURED = 1.08
"""Parts lie alike where giving weight to the place makes good parts at most this much more distant."""
LAID_OVER = 1.12
"""The same of parts that are laid over one another: features differ a little by where in its cell an edge lies."""
LAYOUT_FACTOR = 2.0
"""A layout this many times farther than the good parts' own farthest is unlike everything seen."""


@dataclass(frozen=True)
class Shown:
    """One picture and what became of it."""

    name: str
    use: str  # learnt, duplicate, outlier
    distance: float | None  # its largest, to the other good parts; None for a duplicate, and for a single picture
    typical: float | None  # the median of all


@dataclass(frozen=True)
class Learnt:
    """A memory and how each picture was used, in the order given."""

    memory: Memory
    pictures: list[Shown]
    by_words: int = 0  # of the pictures that were learnt, those on which the words alone reach the threshold


@dataclass(frozen=True)
class Described:
    """One good part as the memory sees it: P pictures of it, as given and turned, the former first."""

    name: str
    digest: bytes  # of its pixels
    frame: tuple[int, int]  # H, W
    tiles: list[Tile]  # P times T
    cells: Tensor  # (P T, D, h, w) float16 on the CPU
    counted: Tensor  # (P T h w,) bool: cells that do not lie in an ignored box, nor outside the picture as given
    layouts: Tensor  # (P, T, L) float16 on the CPU
    zero_shot: tuple[float, float]  # median and largest logit of the map by words


class Learner:
    """Collects good parts of one recipe, then makes the memory. The order they come in does not matter."""

    def __init__(self, inspector: Inspector, name: str, recipe: Recipe, budget: int = BUDGET) -> None:
        self._inspector = inspector
        self._name = name
        self._recipe = recipe.model_copy(update={"memory": None})
        self._budget = budget
        self._projection: Tensor | None = None
        self._pictures: list[Described] = []
        self._duplicates: list[str] = []
        self._order: list[str] = []

    def emptied(self) -> "Learner":
        """One that has collected nothing yet, for pictures that this one has described."""
        other = Learner(self._inspector, self._name, self._recipe, self._budget)
        other._projection = self._projection
        return other

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, image: NDArray[np.uint8], name: str) -> bool:
        """One good part, as `Inspector.inspect` takes it; False for a picture that is already there.

        Raises ImageError naming the picture where its size is another, ConfigError where there are too many.
        """
        try:
            picture = as_rgb(image)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
        return self.take(self.describe(picture, name))

    def describe(self, picture: NDArray[np.uint8], name: str) -> Described:
        """What a memory needs to know of (H, W, 3) uint8 RGB, turned by the recipe's `memory_rotations` too."""
        given = self.describe_as_given(picture, name)
        views = [given]
        rows, columns = counted_region(self._recipe, *picture.shape[:2])
        for degrees in self._recipe.memory_rotations:
            turned, inside = turn(picture, degrees, (columns.start + columns.stop, rows.start + rows.stop))
            view = self.describe_as_given(turned, name)
            grid = (int(view.cells.shape[-1]), int(view.cells.shape[-2]))
            whole = [cv2.resize(inside[t.rows, t.columns], grid, interpolation=cv2.INTER_AREA) for t in view.tiles]
            views.append(replace(view, counted=view.counted & (torch.from_numpy(np.stack(whole)).flatten() > 0.99)))
        return replace(
            given,
            tiles=[tile for view in views for tile in view.tiles],
            cells=torch.cat([view.cells for view in views]),
            counted=torch.cat([view.counted for view in views]),
            layouts=torch.cat([view.layouts for view in views]),
        )

    @torch.inference_mode()
    def describe_as_given(self, picture: NDArray[np.uint8], name: str) -> Described:
        """The same of the picture alone, as it is."""
        return self.describe_encoded(self._inspector.encode([picture], self._recipe), picture, name)

    @torch.inference_mode()
    def describe_encoded(self, encoded: Encoded, picture: NDArray[np.uint8], name: str) -> Described:
        """The same of a picture that is encoded already."""
        inspector = self._inspector
        levels = inspector.levels(encoded)
        if self._projection is None:
            wanted = projection(sum(level.shape[1] for level in levels))
            self._projection = None if wanted is None else wanted.to(inspector.towers.device)
        cells = descriptors(levels, self._projection)
        keep = inspector.counted(encoded, self._recipe)
        logits = inspector.zero_shot(encoded, self._recipe)[keep].logit(1e-6)
        grid = (int(cells.shape[-2]), int(cells.shape[-1]))
        counted = functional.adaptive_avg_pool2d(keep[:, None].float(), grid) > 0.5
        if not bool(counted.any()):
            raise ConfigError(f"{name}: nothing is left to learn from: the recipe's `ignore` covers all of it")
        return Described(
            name,
            hashlib.sha256(picture.tobytes()).digest(),
            (encoded.height, encoded.width),
            encoded.tiles,
            cells.to("cpu", torch.float16),
            counted.flatten().cpu(),
            layout(cells)[None].to("cpu", torch.float16),
            (float(logits.median()), float(logits.max())),
        )

    def take(self, part: Described) -> bool:
        """The same as `add`, for a picture that is described already."""
        first = self._pictures[0] if self._pictures else part
        if part.frame != first.frame:
            (height, width), (rows, columns) = part.frame, first.frame
            raise ImageError(f"{part.name}: is {width} x {height} pixels, the good parts before it {columns} x {rows}")
        self._order.append(part.name)
        if any(known.digest == part.digest for known in self._pictures):
            self._duplicates.append(part.name)
            return False
        if len(self._pictures) >= MOST_GOOD_PARTS:
            raise ConfigError(f"{part.name}: a memory takes at most {MOST_GOOD_PARTS} good parts")
        self._pictures.append(part)
        return True

    @torch.inference_mode()
    def learn(self, *, keep_all: bool = False) -> Learnt:
        """The memory of what was added; `keep_all` keeps outliers too. Raises ConfigError where nothing was added."""
        if not self._pictures:
            raise ConfigError("a memory needs at least one picture of a good part")
        given = sorted(self._pictures, key=lambda picture: picture.digest)
        registration = self._registration(given)
        place, scores = self._at_best_place(given, registration)
        largest = scores.largest
        kept = [picture for picture, out in zip(given, outliers(largest), strict=True) if keep_all or not out]
        if len(kept) < len(given):
            scores = leave_one_out(self._rows(kept, place, registration), self._budget)
        memory = self._memory(kept, place, scores, len(given) - len(kept), registration)
        typical = float(np.median(largest)) if len(given) > 1 else None
        distance = {picture.name: float(far) for picture, far in zip(given, largest, strict=True)}
        names = {picture.name for picture in kept}
        limit = logit(self._inspector.prepare(self._recipe).threshold)
        by_words = sum(picture.zero_shot[1] >= limit for picture in kept)
        return Learnt(memory, [self._shown(name, names, distance, typical) for name in self._order], by_words)

    def _shown(self, name: str, kept: set[str], distance: dict[str, float], typical: float | None) -> Shown:
        if name in self._duplicates:
            return Shown(name, "duplicate", None, typical)
        return Shown(
            name, "learnt" if name in kept else "outlier", distance[name] if typical is not None else None, typical
        )

    def _registration(self, pictures: Sequence[Described]) -> Registration | None:
        """On the part whose layout is most like the others', where the recipe says that parts shift."""
        if not self._recipe.memory_registration or len(pictures) < 2:
            return None
        layouts = torch.stack([one.layouts[0].flatten() for one in pictures]).float()
        typical = pictures[int((layouts @ layouts.sum(dim=0)).argmax())]
        return Registration.of(typical.cells[0].to(self._inspector.towers.device).float())

    def _rows(
        self, pictures: Sequence[Described], place: float, registration: Registration | None = None
    ) -> list[Tensor]:
        """Of every picture's counted cells (n, D + 2) float32 on the device."""
        device = self._inspector.towers.device
        rows = []
        for one in pictures:
            cells = placed(one.cells.to(device).float(), one.tiles, one.frame, place, registration)
            rows.append(cells.flatten(0, 1)[one.counted.to(device)])
        return rows

    def _at_best_place(self, pictures: Sequence[Described], registration: Registration | None) -> tuple[float, Scores]:
        """With PLACE where the parts always lie alike, so that it costs good parts little; else without."""
        free = leave_one_out(self._rows(pictures, 0.0), self._budget)
        if len(pictures) < 2:
            return 0.0, free
        bound = leave_one_out(self._rows(pictures, PLACE, registration), self._budget)
        limit = FIXTURED if registration is None else LAID_OVER
        return (PLACE, bound) if bound.ordinary <= limit * free.ordinary else (0.0, free)

    def _memory(
        self,
        kept: Sequence[Described],
        place: float,
        scores: Scores,
        left_out: int,
        registration: Registration | None,
    ) -> Memory:
        towers = self._inspector.towers
        prepared = self._inspector.prepare(self._recipe)
        layouts = torch.cat([one.layouts for one in kept])
        about = About(
            bundle=towers.bundle.name,
            bundle_sha256=towers.bundle.sha256,
            recipe=self._name,
            object=self._recipe.object,
            words_sha256=words_sha256(prepared.words),
            localiser=prepared.localiser,
            frame=kept[0].frame,
            roi=self._recipe.roi,
            ignore=self._recipe.ignore,
            tiling=self._recipe.tiling,
            rotations=self._recipe.memory_rotations,
            pictures=len(kept),
            outliers=left_out,
            place=place,
            ordinary=round(scores.ordinary, 5),
            striking=round(scores.striking, 5),
            zero_shot_ordinary=round(float(np.median([one.zero_shot[0] for one in kept])), 5),
            zero_shot_striking=round(float(np.median([one.zero_shot[1] for one in kept])), 5),
            layout_limit=round(
                LAYOUT_FACTOR * farthest_layout(torch.stack([one.layouts[0] for one in kept]).float()), 5
            ),
            registered=self._recipe.memory_registration,
        )
        tensors = {"bank": scores.core.to("cpu", torch.float16), "layouts": layouts}
        if self._projection is not None:
            tensors["projection"] = self._projection.to("cpu", torch.float16)
        if registration is not None and place > 0.0:
            tensors["directions"] = registration.directions.to("cpu", torch.float16)
            tensors["reference"] = registration.reference.to("cpu", torch.float16)
        return make_memory(about, tensors, towers.device)


def turn(
    picture: NDArray[np.uint8], degrees: float, doubled_centre: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(H, W, 3) turned counter-clockwise in its frame, and (H, W) 1 where it shows what was in the picture, else 0.

    `doubled_centre`: x and y of the centre times two, in pixels' edges. Beyond the picture its border is mirrored.
    """
    height, width = picture.shape[:2]
    centre = ((doubled_centre[0] - 1) / 2, (doubled_centre[1] - 1) / 2)
    matrix = cv2.getRotationMatrix2D(centre, degrees, 1.0)
    size = (width, height)
    turned = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    inside = cv2.warpAffine(np.ones((height, width), np.float32), matrix, size, flags=cv2.INTER_LINEAR)
    return np.asarray(turned, np.uint8), np.asarray(inside, np.float32)
