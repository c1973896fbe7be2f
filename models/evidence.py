"""What is known of pictures on their way: the recipe made ready, what the towers said, what PPG and CPS said."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawline.config.recipe import Recipe
from flawline.models.frames import FrameGeometry
from flawline.models.memory import Memory, Remembered
from flawline.models.prompt import PointPrompts
from flawline.models.refine import Cascade
from flawline.models.stages import StageClock
from flawline.models.tiles import Tile
from flawline.models.words import Words


@dataclass(frozen=True)
class Prepared:
    """A recipe made ready: its text features and the thresholds that hold."""

    recipe: Recipe
    localiser: str
    words: Words
    text: Tensor  # (D, 2)
    region_threshold: float
    threshold: float
    memory_start: float  # where a map with a memory in it has its start: the lesser of S_a's and the bundle's decision
    memory: Memory | None = None  # of good parts
    warning: str | None = None  # of the recipe: those of docs/verdicts.md that hold for every picture


@dataclass
class Encoded:
    """Pictures of one size and what the towers have said of them so far: N pictures of T tiles, B = N T."""

    count: int
    height: int
    width: int
    tiles: list[Tile]
    pixels: Tensor  # (B, 3, h, w) uint8, picture by picture
    geometry: FrameGeometry  # of one tile
    clip_input: Tensor  # (B, 3, S, S) normalised
    clock: StageClock
    taps: list[Tensor] | None = None
    levels: list[Tensor] | None = None  # what a memory compares
    maps: dict[tuple[str, Words, tuple[str, float, float] | None], Tensor] = field(default_factory=dict)
    """By localiser, words, and a memory's hash, share and start."""
    remembered: dict[str, Remembered] = field(default_factory=dict)  # by the memory's hash
    embeddings: dict[int, Tensor] = field(default_factory=dict)  # tile number -> (C, h, w)


@dataclass
class Refined:
    """What PPG and CPS said of the suspicious tiles, numbered by `rows`."""

    rows: list[int]
    prompts: PointPrompts
    cascade: Cascade


@dataclass
class Evidence:
    """What CLIP, PPG and CPS say of encoded tiles under one recipe, before fusion and decision."""

    maps: Tensor  # (B, S, S) float32, P(abnormal) in CLIP's frame
    regions: Tensor  # (B, S, S) bool, S_a
    refined: Refined | None = None  # None where every S_a is empty, or SAM was left out

    @cached_property
    def suspicious(self) -> list[int]:
        """Numbers of the tiles whose S_a is not empty: the gate, the one value that the host reads before the end."""
        return [row for row, any_pixel in enumerate(self.regions.flatten(1).any(dim=1).tolist()) if any_pixel]


def points_in_frame(encoded: Encoded, refined: Refined, place: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The point prompts of the refined tile number `place`: (n, 2) x, y in the captured frame, and (n,) labels."""
    tile = encoded.tiles[refined.rows[place] % len(encoded.tiles)]
    points, labels = refined.prompts.of_frame(place)
    offset = np.array([tile.columns.start, tile.rows.start], np.float32)
    return points.cpu().numpy() + offset, labels.cpu().numpy()


def pick(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows, rising: by views, for a list used as an index would be copied to the device, and waited for."""
    return tensor if len(rows) == len(tensor) else torch.stack([tensor[row] for row in rows])
