"""The memory of a recipe: what good parts look like, kept as descriptors, and how it joins the zero-shot map.

A cell's distance is that to the nearest descriptor of the memory, all cells by one matrix product (PatchCore,
section 3.3). Distance and zero-shot logit are each put on a scale on which 0 is an ordinary place of a good
part and 1 the most striking one; how good parts score is taken once, while learning, never from the picture
that is judged. The distance counts wherever it lies, words only from DOUBT on: they add, and never take
away. `memory_file.py` reads and writes it, `memory_learn.py` makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ImageError
from flawline.config.recipe import Box, TilingSettings
from flawline.models.descriptors import descriptors, layout
from flawline.models.registration import Registration
from flawline.models.tiles import Tile

CELLS_AT_ONCE = 8192  # queries in one matrix product
GAIN = 4.0
"""Logits for one step on the fused scale."""
STRIKING = 1.3
"""Where on the fused scale the map reaches the bundle's own threshold: a start, for a line calibrates its own."""
DOUBT = 0.7
"""Where on the zero-shot scale words begin to count. They cry at edges and print of good parts too, and a missing or
wrong part is nothing to them: what they call clean is no reason to overrule the memory."""
LEAST_SPREAD = 1.0
"""Logits: a zero-shot map that hardly moves on good parts is not blown up to more than this."""


class About(BaseModel):
    """What a memory says of itself. All of it is hashed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str
    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    recipe: str
    object: str
    words_sha256: str
    localiser: str
    frame: tuple[int, int]  # H, W of the pictures
    roi: Box | None
    ignore: tuple[Box, ...]
    tiling: TilingSettings
    rotations: tuple[float, ...]  # degrees by which every good part was turned as well
    pictures: int  # that it remembers
    outliers: int  # that were left out
    place: float  # weight of a cell's place in the frame, 0 where parts lie anywhere
    ordinary: float  # distance, median over cells of good parts
    striking: float  # distance, median over good parts of their largest
    zero_shot_ordinary: float  # the same of the zero-shot map, logits
    zero_shot_striking: float
    layout_limit: float  # a layout farther than this from all known ones is worth a warning
    registered: bool = False  # parts may have shifted


@dataclass(frozen=True)
class Remembered:
    """What a memory says of B tiles of N pictures."""

    distances: Tensor  # (B, h, w) float32
    strange: Tensor  # (N,) float32: how far each picture's layout is from the nearest known one


@dataclass(frozen=True)
class Memory:
    """A memory on its device, ready to judge. `sha256` is that of its content."""

    about: About
    sha256: str
    bank: Tensor  # (K, D + 2) float32: descriptors, and where in the frame they were, times `place`
    layouts: Tensor  # (N, T, L) float32, of every picture, turned ones too, and tile
    projection: Tensor | None  # (D, C) float32
    registration: Registration | None  # None where the recipe asks for none, or parts lie anywhere

    def cells(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels of B tiles -> their descriptors (B, D, h, w)."""
        return descriptors(levels, self.projection)

    def distances(self, cells: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """(B, D, h, w) -> (B, h, w) float32: how far the nearest remembered descriptor is."""
        return nearest(self.rows(cells, tiles).flatten(0, 1), self.bank).view(len(cells), *cells.shape[-2:])

    def rows(self, cells: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """(B, D, h, w) -> (B, h w, D + 2), as the bank holds them."""
        return placed(cells, tiles, self.about.frame, self.about.place, self.registration)

    def stored(self) -> dict[str, Tensor]:
        """The tensors as a file holds them, half precision."""
        tensors = {"bank": self.bank, "layouts": self.layouts}
        if self.projection is not None:
            tensors["projection"] = self.projection
        if self.registration is not None:
            tensors["directions"], tensors["reference"] = self.registration.directions, self.registration.reference
        return {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}

    def fuse(
        self, zero_shot: Tensor, distances: Tensor, threshold: float, share: float, doubt: float = DOUBT
    ) -> Tensor:
        """(B, S, S) P(abnormal) by words, (B, h, w) distances -> (B, S, S) float32 in (0, 1).

        `share` is the memory's weight, the words have the rest, from `doubt` on their scale on. `threshold` is the
        lower of the bundle's own two: what is clearly more striking than good parts lies above it.
        """
        about, size = self.about, zero_shot.shape[-1]
        spread = max(about.striking - about.ordinary, 1e-6)
        remembered = (distances - about.ordinary) / spread
        enlarged = functional.interpolate(remembered[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        wide = max(about.zero_shot_striking - about.zero_shot_ordinary, LEAST_SPREAD)
        told = (zero_shot.logit(1e-6) - about.zero_shot_ordinary) / wide
        joined = share * enlarged + (1.0 - share) * (told - doubt).clamp_min(0.0) / (1.0 - doubt)
        return torch.sigmoid(GAIN * (joined - STRIKING) + logit(threshold))

    def look(self, levels: Sequence[Tensor], tiles: Sequence[Tile], frame: tuple[int, int]) -> Remembered:
        """Levels of B = N x T tiles of frames of H x W. Raises ImageError where the good parts had another size."""
        self.check_frame(frame)
        cells = self.cells(levels)
        return Remembered(self.distances(cells, tiles), self.strangeness(cells))

    def check_frame(self, frame: tuple[int, int]) -> None:
        """Raises ImageError where the good parts had another size than H x W."""
        if frame != self.about.frame:
            height, width = self.about.frame
            raise ImageError(
                f"the frame has {frame[1]} x {frame[0]} pixels, the good parts that the recipe's memory was learnt "
                f"from {width} x {height}: learn again"
            )

    def strangeness(self, cells: Tensor) -> Tensor:
        """(B, D, h, w) -> (N,): distance of the layout from the nearest known one, of the strangest tile."""
        tiles = self.layouts.shape[1]
        seen = layout(cells).view(-1, tiles, self.layouts.shape[2])
        alike = torch.einsum("btl,ntl->btn", seen, self.layouts).amax(dim=2)
        return (1.0 - alike).amax(dim=1)

    def warnings(self, remembered: Remembered) -> list[str | None]:
        """Of every picture: None, or that it is unlike everything seen."""
        limit = self.about.layout_limit
        return [
            f"unlike every good part: distance {far:.3f}, known ones lie within {limit:.3f}; has the camera moved?"
            if far > limit
            else None
            for far in remembered.strange.tolist()
        ]


def logit(probability: float) -> float:
    """Of a probability, kept away from 0 and 1."""
    return float(torch.tensor(probability, dtype=torch.float64).logit(1e-3))


def placed(
    cells: Tensor,
    tiles: Sequence[Tile],
    frame: tuple[int, int],
    weight: float,
    registration: Registration | None = None,
) -> Tensor:
    """(B, D, h, w) -> (B, h w, D + 2): descriptors with their place in the frame, in frames, times `weight`.

    The squared distance of two is then 2 (1 - cosine) + weight^2 (distance in the frame)^2. With a registration the
    place is the one on the good part that others are laid over, at most at the frame's edge.
    """
    batch, _, height, width = cells.shape
    corners = tuple((tile.rows.start, tile.columns.start, tile.height, tile.width) for tile in tiles)
    where, cell = _places(corners, frame, height, width, cells.device)
    flat = where.repeat(batch // len(tiles), 1, 1)
    if registration is not None:
        moved = registration.shifts(cells) * cell.repeat(batch // len(tiles), 1)
        flat = (flat - moved[:, None]).clamp(0.0, 1.0)
    return torch.cat([cells.flatten(2).transpose(1, 2), weight * flat], dim=2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # also used where gradients are taken
def _places(
    tiles: tuple[tuple[int, int, int, int], ...], frame: tuple[int, int], height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(T, h w, 2) where each cell of each tile (top, left, height, width) lies, and (T, 2) a cell's size, in frames.

    The same for every frame of a line: sent to the device anew, they would make the host wait for it each time.
    """
    where = torch.empty(len(tiles), height, width, 2)
    for number, (top, left, tile_height, tile_width) in enumerate(tiles):
        where[number, :, :, 0] = ((top + (torch.arange(height) + 0.5) * tile_height / height) / frame[0])[:, None]
        where[number, :, :, 1] = (left + (torch.arange(width) + 0.5) * tile_width / width) / frame[1]
    cell = [[tile[2] / height / frame[0], tile[3] / width / frame[1]] for tile in tiles]
    return where.view(len(tiles), -1, 2).to(device), torch.tensor(cell).to(device)


def nearest(queries: Tensor, bank: Tensor) -> Tensor:
    """(n, D), (K, D) -> (n,): Euclidean distance to the nearest row of the bank."""
    half = 0.5 * bank.square().sum(dim=1)
    parts = []
    for start in range(0, len(queries), CELLS_AT_ONCE):
        part = queries[start : start + CELLS_AT_ONCE]
        # the smallest |q - b|^2 = |q|^2 - 2 max(q.b - |b|^2 / 2)
        best = torch.addmm(-half, part, bank.T).amax(dim=1)
        parts.append((part.square().sum(dim=1) - 2.0 * best).clamp_min(0.0).sqrt())
    return torch.cat(parts)
