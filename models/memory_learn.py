"""Learning a memory: descriptors of good parts, outliers left out, a core that covers them, their own scores."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ConfigError, ImageError
from flawline.config.recipe import Recipe
from flawline.models.coreset import coreset, outliers
from flawline.models.descriptors import descriptors, layout, projection
from flawline.models.frames import as_rgb
from flawline.models.inspector import Inspector
from flawline.models.memory import About, Memory, nearest, placed
from flawline.models.memory_file import make_memory, words_sha256
from flawline.models.tiles import Tile

MOST_PICTURES = 500
BUDGET = 1500  # rows of the bank
CANDIDATES = 40_000  # descriptors that the bank is chosen from
PLACE = 3.0
"""Weight of a place in the frame, where parts always lie alike: a tenth of the frame away is as a cosine of 0.955."""
FIXTURED = 1.08
"""Parts lie alike where giving weight to the place makes good parts at most this much more distant."""
FEW = 5
LEAST_LAYOUT = 0.02  # parts that are all but equal may still differ so much
LAYOUT_FACTOR = 2.0
"""A layout this many times farther than the good parts' own farthest is unlike everything seen."""


@dataclass(frozen=True)
class Scale:
    """The bundle's own scale: how far two good parts are from one another. Of drawn products, the median of what is
    ordinary and the upper quartile of what is striking."""

    ordinary: float = 0.3
    striking: float = 0.69
    layout: float = 0.3


OWN_SCALE = Scale()


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


@dataclass(frozen=True)
class Described:
    """One good part as the memory sees it."""

    name: str
    digest: bytes  # of its pixels
    frame: tuple[int, int]  # H, W
    tiles: list[Tile]
    cells: Tensor  # (T, D, h, w) float16 on the CPU
    counted: Tensor  # (T h w,) bool: cells that do not lie in an ignored box
    layout: Tensor  # (T, L) float16 on the CPU
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

    @torch.inference_mode()
    def describe(self, picture: NDArray[np.uint8], name: str) -> Described:
        """What a memory needs to know of (H, W, 3) uint8 RGB."""
        inspector = self._inspector
        encoded = inspector.encode([picture], self._recipe)
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
            layout(cells).to("cpu", torch.float16),
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
        if len(self._pictures) >= MOST_PICTURES:
            raise ConfigError(f"{part.name}: a memory takes at most {MOST_PICTURES} good parts")
        self._pictures.append(part)
        return True

    @torch.inference_mode()
    def learn(self, *, keep_all: bool = False) -> Learnt:
        """The memory of what was added; `keep_all` keeps outliers too. Raises ConfigError where nothing was added."""
        if not self._pictures:
            raise ConfigError("a memory needs at least one picture of a good part")
        given = sorted(self._pictures, key=lambda picture: picture.digest)
        scores = self._at_best_place(given)
        largest = scores.largest
        kept = [picture for picture, out in zip(given, outliers(largest), strict=True) if keep_all or not out]
        if len(kept) < len(given):
            scores = self._leave_one_out(kept, scores.place)
        memory = self._memory(kept, scores, len(given) - len(kept))
        typical = float(np.median(largest)) if len(given) > 1 else None
        distance = {picture.name: float(far) for picture, far in zip(given, largest, strict=True)}
        names = {picture.name for picture in kept}
        return Learnt(memory, [self._shown(name, names, distance, typical) for name in self._order])

    def _shown(self, name: str, kept: set[str], distance: dict[str, float], typical: float | None) -> Shown:
        if name in self._duplicates:
            return Shown(name, "duplicate", None, typical)
        return Shown(
            name, "learnt" if name in kept else "outlier", distance[name] if typical is not None else None, typical
        )

    def _rows(self, pictures: Sequence[Described], place: float) -> list[Tensor]:
        """Of every picture's counted cells (n, D + 2) float32 on the device."""
        device = self._inspector.towers.device
        return [
            placed(one.cells.to(device).float(), one.tiles, one.frame, place).flatten(0, 1)[one.counted.to(device)]
            for one in pictures
        ]

    def _core(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Candidates and the picture each is from, the core's rows and the picture each is from."""
        most = max(CANDIDATES // len(rows), 1)
        generator = torch.Generator().manual_seed(len(rows))
        parts = [
            part if len(part) <= most else part[torch.randperm(len(part), generator=generator)[:most].to(part.device)]
            for part in rows
        ]
        candidates = torch.cat(parts)
        counts = torch.tensor([len(part) for part in parts])
        source = torch.arange(len(parts)).repeat_interleave(counts).to(candidates.device)
        chosen = coreset(candidates, self._budget)
        return candidates, source, candidates[chosen], source[chosen]

    def _at_best_place(self, pictures: Sequence[Described]) -> "_Scores":
        """With PLACE where the parts always lie alike, so that it costs good parts little; else without."""
        free = self._leave_one_out(pictures, 0.0)
        if len(pictures) < 2:
            return free
        bound = self._leave_one_out(pictures, PLACE)
        return bound if bound.ordinary <= FIXTURED * free.ordinary else free

    def _leave_one_out(self, pictures: Sequence[Described], place: float) -> "_Scores":
        """How each picture's cells look to a memory of the others.

        The core without one picture: what came from it is replaced by the nearest that others have. The bundle's
        own scale counts as one more picture, so that two or three do not say alone how much good parts differ.
        """
        rows = self._rows(pictures, place)
        candidates, source, core, core_source = self._core(rows)
        if len(pictures) < 2:
            return _Scores(place, core, OWN_SCALE.ordinary, OWN_SCALE.striking, np.zeros(len(pictures)))
        substitutes = torch.empty_like(core)
        for number in range(len(pictures)):
            own = core_source == number
            if bool(own.any()):
                others = candidates[source != number]
                alike = core[own] @ others.T - 0.5 * others.square().sum(dim=1)
                substitutes[own] = others[alike.argmax(dim=1)]
        medians, largest = [], []
        for number, queries in enumerate(rows):
            own = core_source == number
            distances = nearest(queries, torch.cat([core[~own], substitutes[own]]))
            medians.append(float(distances.median()))
            largest.append(float(distances.max()))
        ordinary, striking = np.median([*medians, OWN_SCALE.ordinary]), np.median([*largest, OWN_SCALE.striking])
        return _Scores(place, core, float(ordinary), float(striking), np.array(largest))

    def _memory(self, kept: Sequence[Described], scores: "_Scores", left_out: int) -> Memory:
        towers = self._inspector.towers
        prepared = self._inspector.prepare(self._recipe)
        layouts = torch.stack([one.layout for one in kept])
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
            pictures=len(kept),
            outliers=left_out,
            duplicates=len(self._duplicates),
            place=scores.place,
            ordinary=round(scores.ordinary, 5),
            striking=round(scores.striking, 5),
            zero_shot_ordinary=round(float(np.median([one.zero_shot[0] for one in kept])), 5),
            zero_shot_striking=round(float(np.median([one.zero_shot[1] for one in kept])), 5),
            layout_limit=round(LAYOUT_FACTOR * farthest_layout(layouts.float()), 5),
        )
        tensors = {"bank": scores.core.to("cpu", torch.float16), "layouts": layouts}
        if self._projection is not None:
            tensors["projection"] = self._projection.to("cpu", torch.float16)
        return make_memory(about, tensors, towers.device)


@dataclass(frozen=True)
class _Scores:
    """How good parts look to one another with one weight of places, and the core that was chosen with it."""

    place: float
    core: Tensor  # (K, D + 2)
    ordinary: float
    striking: float
    largest: NDArray[np.float64]  # of every picture


def farthest_layout(layouts: Tensor) -> float:
    """(N, T, L) -> the largest distance of a picture's layout to the nearest other one's; of fewer than five, the
    bundle's own where that is more."""
    count = len(layouts)
    largest = OWN_SCALE.layout if count < FEW else LEAST_LAYOUT
    if count < 2:
        return largest
    for number in range(count):
        others = torch.cat([layouts[:number], layouts[number + 1 :]])
        alike = torch.einsum("tl,ntl->tn", layouts[number], others).amax(dim=1)
        largest = max(largest, float((1.0 - alike).max()))
    return largest
