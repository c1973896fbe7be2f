"""The inspection of a picture: CLIP locates, PPG prompts, SAM refines, the final map decides.

The way of a picture, top to bottom: `encode` (crop, tiles, CLIP's features), `judge` (map, gate, SAM's embedding
once, point prompts, cascade, fusion, decision). What has been encoded can be judged again by other recipes.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawline.config.errors import ConfigError, ImageError
from flawline.config.recipe import Recipe
from flawline.models.bundle import Bundle, user_folder
from flawline.models.conclude import conclude, conclude_by_clip, trace_of_sam
from flawline.models.decide import counted_pixels, counted_region
from flawline.models.evidence import Encoded, Evidence, Prepared, Refined, pick
from flawline.models.features import FeatureEncoder
from flawline.models.frames import FrameGeometry, as_rgb, check_shape, fit, squash, upload
from flawline.models.memory import Memory, Remembered
from flawline.models.memory_file import fitting_memory
from flawline.models.prompt import region
from flawline.models.results import InspectionResult, InspectionTrace
from flawline.models.stages import StageClock
from flawline.models.text import text_features
from flawline.models.tiles import Tile, cut_tiles
from flawline.models.towers import Towers, load_towers
from flawline.models.words import Words

KEPT_MASKS = 64
"""Masks of ignored boxes that are kept on the device, one per recipe and size of the frames."""


class Inspector:
    """CLIP and SAM of one bundle, judging pictures by recipes. Not thread-safe; one per process or device."""

    tile_batch = 4
    """So many tiles (or pictures of a batch) go through an image encoder at once: what bounds the memory it takes."""

    def __init__(self, towers: Towers, recipe: Recipe | None = None) -> None:
        self.towers = towers
        self._prepared: dict[Recipe, Prepared] = {}
        self._encoders: dict[str, FeatureEncoder] = {}  # of F, where a recipe names another than SAM's
        self._kept: dict[Any, Tensor] = {}  # masks of what is not ignored, (T, S, S) on the device
        self.recipe = recipe if recipe is not None else Recipe()
        self.prepare(self.recipe)

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle = "demo",
        device: str = "auto",
        precision: str = "auto",
        recipe: Recipe | None = None,
    ) -> Self:
        """Load a bundle by its name or folder.

        `device`: auto, cpu, cuda, cuda:N. `precision`: auto, bf16, fp16, fp32. Raises BundleError, naming the
        file, where the bundle is missing, corrupt or does not fit together; ConfigError for a device that is
        not there.
        """
        return cls(load_towers(bundle, device, precision), recipe)

    def prepare(self, recipe: Recipe) -> Prepared:
        """Compute a recipe's text features, once.

        Raises BundleError where the bundle cannot serve it, ConfigError where it cannot read the recipe's words.
        """
        if recipe not in self._prepared:
            towers = self.towers
            manifest = towers.bundle.manifest
            name = recipe.prompt.features
            if name != "sam" and name not in self._encoders:
                folders = [towers.bundle.folder, user_folder().parent / "features"]
                self._encoders[name] = FeatureEncoder(name, manifest.sam.input_size, folders).to(towers.device)
            words = Words.of(recipe, manifest.prompts)
            identity = towers.bundle.checksum(manifest.clip.checkpoint)
            wanted = recipe.prompt.region_threshold
            localiser = towers.localiser_of(recipe)
            memory = fitting_memory(recipe, towers.bundle, words, localiser, towers.device)
            text = text_features(towers.clip, words, identity)
            threshold_warning = recipe.calibration_warning(
                towers.bundle.name, towers.bundle.sha256, None if memory is None else memory.sha256, towers.precision
            )
            cut = manifest.thresholds.region if wanted is None else wanted
            unchosen = None
            if recipe.threshold is None and not manifest.states_thresholds:
                unchosen = f"nobody chose a threshold: bundle {manifest.name!r} states none, so 0.5 serves; calibrate"
            self._prepared[recipe] = Prepared(
                recipe,
                localiser,
                words,
                text.pair,
                cut,
                manifest.thresholds.decision if recipe.threshold is None else recipe.threshold,
                min(cut, manifest.thresholds.decision),
                memory,
                "; ".join(filter(None, (text.warning(towers.clip, words), unchosen, threshold_warning))) or None,
            )
        return self._prepared[recipe]

    def inspect(self, image: NDArray[np.uint8], recipe: Recipe | None = None) -> InspectionResult:
        """Judge one picture, (H, W, 3) uint8 RGB or (H, W) grey. Raises ImageError where it can't be judged."""
        return self.inspect_batch([image], recipe)[0]

    def inspect_batch(
        self, images: Sequence[NDArray[np.uint8]], recipe: Recipe | None = None
    ) -> list[InspectionResult]:
        """Judge pictures of one size at once; the same results as one by one. Raises ImageError."""
        recipe = self.recipe if recipe is None else recipe
        return self.judge(self.encode(images, recipe), recipe)

    @torch.inference_mode()
    def encode(self, images: Sequence[NDArray[np.uint8]], recipe: Recipe | None = None) -> Encoded:
        """Cut out the region of interest and its tiles, and run CLIP's image tower over them."""
        recipe = self.recipe if recipe is None else recipe
        prepared = self.prepare(recipe)
        pictures = [as_rgb(image) for image in images]
        if not pictures or any(picture.shape != pictures[0].shape for picture in pictures):
            raise ImageError("a batch holds one or more images of the same size")
        height, width = pictures[0].shape[:2]
        rows, columns = counted_region(recipe, height, width)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            raise ImageError(f"the recipe's roi {recipe.roi} lies outside a frame of {width} x {height} pixels")
        if (count := counted_pixels(recipe, height, width)) < recipe.min_defect_area_px:
            raise ImageError(
                f"in a frame of {width} x {height} pixels the recipe's roi and ignore leave {count} to be judged: "
                f"no defect has min_defect_area_px = {recipe.min_defect_area_px} there"
            )
        tiles = cut_tiles(rows, columns, recipe.tiling)
        check_shape(tiles[0].height, tiles[0].width)
        clock = StageClock(self.towers.device)
        clip = self.towers.clip
        parts = [upload(picture[tile.rows, tile.columns], self.towers.device) for picture in pictures for tile in tiles]
        pixels = torch.cat(parts)
        geometry = FrameGeometry(
            tiles[0].height, tiles[0].width, clip.input_size, self.towers.bundle.manifest.sam.input_size
        )
        clip_input = clip.normalise(torch.cat([squash(part, clip.input_size) for part in parts]))
        encoded = Encoded(len(pictures), height, width, tiles, pixels, geometry, clip_input, clock)
        self._map(encoded, prepared)
        clock.lap("clip")
        return encoded

    def _map(self, encoded: Encoded, prepared: Prepared) -> Tensor:
        """(B, S, S) P(abnormal) in CLIP's frame, by words and, where there is one, memory; ignored boxes are zero."""
        maps, memory = self._zero_shot(encoded, prepared), prepared.memory
        if memory is not None:
            share, start = prepared.recipe.memory_share, prepared.memory_start
            key = (prepared.localiser, prepared.words, (memory.sha256, share, start))
            if key not in encoded.maps:
                distances = self._remember(encoded, memory).distances
                encoded.maps[key] = memory.fuse(maps, distances, start, share)
            maps = encoded.maps[key]
        return self.without_ignored(encoded, maps, prepared.recipe)

    def _zero_shot(self, encoded: Encoded, prepared: Prepared) -> Tensor:
        key = (prepared.localiser, prepared.words, None)
        if key not in encoded.maps:
            if prepared.localiser == "adapter":
                self.levels(encoded)
            parts = [
                self.towers.map(
                    None if encoded.taps is None else [tap[part] for tap in encoded.taps],
                    encoded.clip_input[part],
                    prepared.text,
                    prepared.localiser,
                )
                for part in self._passes(len(encoded.clip_input))
            ]
            encoded.maps[key] = torch.cat(parts)
        return encoded.maps[key]

    @torch.inference_mode()
    def zero_shot(self, encoded: Encoded, recipe: Recipe | None = None) -> Tensor:
        """(B, S, S) P(abnormal) by words alone, in CLIP's frame; ignored boxes are zero."""
        prepared = self.prepare(self.recipe if recipe is None else recipe)
        return self.without_ignored(encoded, self._zero_shot(encoded, prepared), prepared.recipe)

    def counted(self, encoded: Encoded, recipe: Recipe) -> Tensor:
        """(B, S, S) bool in CLIP's frame: what does not lie in an ignored box."""
        size = self.towers.clip.input_size
        everything = torch.ones(len(encoded.pixels), size, size, device=self.towers.device)
        return self.without_ignored(encoded, everything, recipe) > 0

    def levels(self, encoded: Encoded) -> list[Tensor]:
        """What a memory compares: features of the image tower, (B, C_i, h_i, w_i), finest first."""
        if encoded.levels is None:
            dense = self.towers.dense
            parts = [dense(encoded.clip_input[part]) for part in self._passes(len(encoded.clip_input))]
            encoded.taps = [torch.cat(tap) for tap in zip(*(part.taps for part in parts), strict=True)]
            if parts[0].levels is parts[0].taps:
                encoded.levels = encoded.taps
            else:
                encoded.levels = [torch.cat(level) for level in zip(*(part.levels for part in parts), strict=True)]
        return encoded.levels

    def _passes(self, count: int) -> list[slice]:
        """Of so many tiles: those that go through an encoder together, pass by pass."""
        return [slice(start, start + self.tile_batch) for start in range(0, count, self.tile_batch)]

    def _remember(self, encoded: Encoded, memory: Memory) -> Remembered:
        """Raises ImageError where the frame's size is not the one that the memory was learnt at."""
        if memory.sha256 not in encoded.remembered:
            frame = (encoded.height, encoded.width)
            encoded.remembered[memory.sha256] = memory.look(self.levels(encoded), encoded.tiles, frame)
        return encoded.remembered[memory.sha256]

    def _warnings(self, encoded: Encoded, prepared: Prepared) -> list[str | None]:
        """Of every picture: what holds for the recipe, a region that the frame does not hold as a whole, a frame unlike
        everything that the memory holds."""
        strange: list[str | None] = [None] * encoded.count
        if prepared.memory is not None:
            strange = prepared.memory.warnings(self._remember(encoded, prepared.memory))
        beyond, roi = None, prepared.recipe.roi
        if roi is not None and (roi[0] + roi[2] > encoded.width or roi[1] + roi[3] > encoded.height):
            beyond = f"the recipe's roi {roi} reaches beyond the frame of {encoded.width} x {encoded.height} pixels"
        return ["; ".join(filter(None, (prepared.warning, beyond, one))) or None for one in strange]

    def without_ignored(self, encoded: Encoded, maps: Tensor, recipe: Recipe) -> Tensor:
        """(B, S, S) -> the same with zeros inside the recipe's ignored boxes."""
        if not recipe.ignore:
            return maps
        size = maps.shape[-1]
        key = (recipe.ignore, recipe.roi, recipe.tiling, encoded.height, encoded.width, size)
        if key not in self._kept:
            if len(self._kept) >= KEPT_MASKS:
                self._kept.clear()
            self._kept[key] = self._not_ignored(encoded.tiles, recipe, size).to(maps.device)
        return maps * self._kept[key].repeat(encoded.count, 1, 1)

    @staticmethod
    def _not_ignored(tiles: list[Tile], recipe: Recipe, size: int) -> Tensor:
        """(T, S, S): 0 inside the ignored boxes, else 1."""
        keep = torch.ones(len(tiles), size, size)
        for number, tile in enumerate(tiles):
            for x, y, w, h in recipe.ignore:
                top, left = tile.rows.start, tile.columns.start
                y0, y1 = ((edge - top) * size / tile.height for edge in (y, y + h))
                x0, x1 = ((edge - left) * size / tile.width for edge in (x, x + w))
                keep[number, max(round(y0), 0) : max(round(y1), 0), max(round(x0), 0) : max(round(x1), 0)] = 0
        return keep

    def embedding(self, encoded: Encoded, rows: Sequence[int]) -> Tensor:
        """SAM's image embedding of these tiles, (len(rows), C, h, w); computed once for each tile."""
        missing = [row for row in rows if row not in encoded.embeddings]
        for part in self._passes(len(missing)):
            fitted = self._fitted(encoded, missing[part])
            for row, embedding in zip(missing[part], self.towers.embed(fitted), strict=True):
                encoded.embeddings[row] = embedding
        return torch.stack([encoded.embeddings[row] for row in rows])

    @staticmethod
    def _fitted(encoded: Encoded, rows: Sequence[int]) -> Tensor:
        """(len(rows), 3, sam_height, sam_width): these tiles in SAM's frame."""
        return torch.cat([fit(encoded.pixels[row : row + 1], encoded.geometry) for row in rows])

    @torch.inference_mode()
    def judge(
        self, encoded: Encoded, recipe: Recipe | None = None, *, clip_only: bool = False
    ) -> list[InspectionResult]:
        """The result of every picture. `clip_only` leaves SAM out: the defects are then the components of S_a,
        whatever their size, and the result is marked `degraded`."""
        return self.decide(encoded, self.evidence(encoded, recipe, clip_only=clip_only), recipe, clip_only=clip_only)

    @torch.inference_mode()
    def evidence(
        self,
        encoded: Encoded,
        recipe: Recipe | None = None,
        *,
        clip_only: bool = False,
        located: Evidence | None = None,
    ) -> Evidence:
        """Everything that a decision rests on; `clip_only` leaves SAM out, `located` is what it gave before."""
        prepared = self.prepare(self.recipe if recipe is None else recipe)
        if located is None:
            maps = self._map(encoded, prepared)
            located = Evidence(maps, region(maps, prepared.recipe.prompt, prepared.region_threshold))
            encoded.clock.lap("clip")
        if clip_only or not located.suspicious:
            return located
        return Evidence(located.maps, located.regions, self._refine(encoded, prepared, located))

    @torch.inference_mode()
    def decide(
        self, encoded: Encoded, evidence: Evidence, recipe: Recipe | None = None, *, clip_only: bool = False
    ) -> list[InspectionResult]:
        """The result of every picture from its evidence; see `judge` for `clip_only`."""
        prepared = self.prepare(self.recipe if recipe is None else recipe)
        warn = partial(self._warnings, encoded, prepared)
        return (conclude_by_clip if clip_only else conclude)(encoded, prepared, evidence, warn)

    def _refine(self, encoded: Encoded, prepared: Prepared, located: Evidence) -> Refined:
        recipe, clock, rows = prepared.recipe, encoded.clock, located.suspicious
        embedding = self.embedding(encoded, rows)
        clock.lap("encode")
        features = embedding
        if recipe.prompt.features != "sam":
            encoder = self._encoders[recipe.prompt.features]
            features = torch.cat([encoder(self._fitted(encoded, rows[part])) for part in self._passes(len(rows))])
        most = recipe.cascade.max_regions if recipe.cascade.per_region else None
        maps, regions = pick(located.maps, rows), pick(located.regions, rows)
        prompts = self.towers.prompts(maps, regions, features, encoded.geometry, recipe.prompt, most)
        clock.lap("prompt")
        cascade = self.towers.refine(embedding, prompts, encoded.geometry, recipe.cascade)
        clock.lap("cascade")
        return Refined(rows, prompts, cascade)

    @torch.inference_mode()
    def trace(self, image: NDArray[np.uint8], recipe: Recipe | None = None) -> InspectionTrace:
        """Judge one picture and keep every intermediate. Raises ConfigError for a recipe that cuts tiles."""
        recipe = self.recipe if recipe is None else recipe
        encoded = self.encode([image], recipe)
        if len(encoded.tiles) > 1:
            raise ConfigError("a trace shows one frame: switch the recipe's tiling off")
        evidence = self.evidence(encoded, recipe)
        return InspectionTrace(
            self.decide(encoded, evidence, recipe)[0],
            clip_map=evidence.maps[0].cpu().numpy(),
            region=evidence.regions[0].cpu().numpy(),
            **trace_of_sam(encoded, evidence.refined),
        )
