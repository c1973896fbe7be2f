"""The anomaly maps of a study's rows for one picture: encoded once, then judged by every row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.config.recipe import Recipe
from flawline.models.decide import blank_ignored
from flawline.models.evidence import Encoded, Evidence
from flawline.models.fuse import fuse
from flawline.models.inspector import Inspector
from flawline.models.peers import Peer
from flawline.models.study import AGENT, Row

Size = tuple[int, int]  # height, width
CONTRAST_SCALE = 100.0  # distance in Lab that counts as certainly abnormal
MOST_BOXES = 8


@dataclass(frozen=True)
class RowMap:
    """One row's maps of one picture: at the size of the metrics, and in the captured frame for the image score."""

    at_size: NDArray[np.float32]
    in_frame: NDArray[np.float32]
    stage_ms: dict[str, float]


class RowMaps:
    """Judges pictures by all rows that can run with this bundle."""

    def __init__(
        self,
        inspector: Inspector,
        rows: Sequence[Row],
        base: Recipe,
        size: int | None,
        peers: Mapping[str, Peer] | None = None,
    ) -> None:
        """`size`: edge of the square frame of the metrics; None: the captured frame. `peers`: the models of rows that
        have their own, by key. Raises BundleError where the bundle cannot serve a row."""
        self._inspector = inspector
        self._peers = peers or {}
        self._size = size
        # the agent's own row first: its stage times are then those of one inspection
        ordered = sorted((row for row in rows if row.source is not None), key=lambda row: row.key != AGENT.key)
        self._rows = [(row, row.recipe(base)) for row in ordered]
        for _, recipe in self._rows:
            inspector.prepare(recipe)

    @torch.inference_mode()
    def __call__(self, picture: NDArray[np.uint8]) -> dict[str, RowMap]:
        """(H, W, 3) uint8 RGB -> every row's maps, by key."""
        size = picture.shape[:2] if self._size is None else (self._size, self._size)
        encoded = self._inspector.encode([picture], self._rows[0][1])
        result = {}
        for row, recipe in self._rows:
            if row.source == "contrast":
                plane = contrast(picture, size)
                frame = cv2.resize(plane, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
                if recipe.ignore:
                    blank_ignored(recipe, frame)
                    plane = resize(torch.from_numpy(frame).unsqueeze(0), size)[0].numpy()
                result[row.key] = RowMap(plane, np.asarray(frame, np.float32), {})
                continue
            if row.source == "peer":
                evidence = self._of_peer(self._peers[row.key], encoded, recipe)
            else:
                evidence = self._inspector.evidence(encoded, recipe, clip_only=row.source in ("clip", "blur"))
            stages = encoded.clock.stages() if row.key == AGENT.key else {}
            planes = [self._plane(row, recipe, encoded, evidence, frame) for frame in (size, picture.shape[:2])]
            at_size, in_frame = (plane.float().cpu().numpy() for plane in planes)
            result[row.key] = RowMap(at_size, in_frame, stages)
        return result

    def _of_peer(self, peer: Peer, encoded: Encoded, recipe: Recipe) -> Evidence:
        maps = self._inspector.without_ignored(encoded, peer(encoded.pixels, recipe.object), recipe)
        return Evidence(maps, torch.zeros_like(maps, dtype=torch.bool))

    def _plane(self, row: Row, recipe: Recipe, encoded: Encoded, evidence: Evidence, size: Size) -> Tensor:
        """The row's map at `size`, (h, w) in [0, 1]."""
        frame = (encoded.height, encoded.width)
        whole = len(encoded.tiles) == 1 and (encoded.tiles[0].height, encoded.tiles[0].width) == frame
        if (not whole or recipe.ignore) and size != frame:
            # tiles and regions of interest are put together in the captured frame, and ignored boxes are of it
            return resize(self._plane(row, recipe, encoded, evidence, frame).unsqueeze(0), size)[0]
        tile_size = size if whole else (encoded.tiles[0].height, encoded.tiles[0].width)
        planes = self._tile_planes(row, recipe, encoded, evidence, tile_size)
        if whole:
            total = planes[0]
        else:
            total = planes.new_zeros(frame)
            for tile, plane in zip(encoded.tiles, planes, strict=True):
                total[tile.rows, tile.columns] = torch.maximum(total[tile.rows, tile.columns], plane)
        blank_ignored(recipe, total)
        return total

    def _tile_planes(self, row: Row, recipe: Recipe, encoded: Encoded, evidence: Evidence, size: Size) -> Tensor:
        """(T, h, w): the maps of all tiles, each at `size`."""
        located = resize(evidence.maps, size)
        if row.source in ("clip", "peer"):
            return located
        if row.source == "blur":
            return fuse(located, _logit(resize(blurred(evidence.regions), size)), recipe.fusion)
        refined = evidence.refined
        planes = located.clone() if row.source == "boxes" else fuse(located, None, recipe.fusion)
        if row.source == "boxes":
            planes.zero_()
        for number, tile in enumerate(refined.rows if refined is not None else []):
            assert refined is not None
            if row.source == "boxes":
                planes[tile] = self._boxes(encoded, evidence, tile, size)
            else:
                logits = frame_logits(refined.cascade.levels[-1].logits[number : number + 1], encoded, size)
                planes[tile] = fuse(located[tile : tile + 1], logits, recipe.fusion)[0]
        return planes

    def _boxes(self, encoded: Encoded, evidence: Evidence, tile: int, size: Size) -> Tensor:
        """SAA's map with boxes around the regions of S_a: sum of score times mask over 1 + sum of masks.

        A box has the score of the highest value of the CLIP map in its region; SAM gives one mask per box.
        """
        region = evidence.regions[tile].cpu().numpy().astype(np.uint8)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(region, connectivity=8)
        largest = 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA])[:MOST_BOXES]
        corners, scores = [], []
        plane = evidence.maps[tile].float().cpu().numpy()
        for label in largest:
            x, y, w, h = (float(value) for value in stats[label, :4])
            corners.append([[x, y], [x + w - 1, y + h - 1]])
            scores.append(float(plane[labels == label].max()))
        boxes = encoded.geometry.image_to_sam(encoded.geometry.clip_to_image(torch.tensor(corners)))
        embedding = self._inspector.embedding(encoded, [tile])
        boxes = boxes.flatten(1).to(embedding.device)
        none = torch.zeros(len(boxes), 1, 2, device=embedding.device)
        absent = torch.zeros(len(boxes), 1, dtype=torch.bool, device=embedding.device)
        logits, _ = self._inspector.towers.refiner.decode(
            embedding.expand(len(boxes), -1, -1, -1), none, absent.long(), absent, boxes, ~absent[:, 0]
        )
        masks = (frame_logits(logits[:, 0], encoded, size) > 0).float()
        weight = torch.tensor(scores, device=masks.device)[:, None, None]
        return (masks * weight).sum(0) / (1.0 + masks.sum(0))


def resize(planes: Tensor, size: Size) -> Tensor:
    """(B, h, w) -> (B, *size), bilinear, antialiased where it shrinks."""
    if planes.shape[-2:] == size:
        return planes.float()
    shrinks = planes.shape[-2] > size[0] or planes.shape[-1] > size[1]
    return functional.interpolate(
        planes.float().unsqueeze(1), size, mode="bilinear", align_corners=False, antialias=shrinks
    ).squeeze(1)


def frame_logits(logits: Tensor, encoded: Encoded, size: Size) -> Tensor:
    """(B, 4h, 4w) low-resolution logits -> (B, *size): to SAM's frame, the padding cut off, to `size`."""
    geometry = encoded.geometry
    padded = resize(logits, (geometry.sam_size, geometry.sam_size))
    shown = padded[:, : geometry.sam_height, : geometry.sam_width]
    if size == (geometry.height, geometry.width):  # as the product does it
        return functional.interpolate(shown.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)
    return resize(shown, size)


def blurred(regions: Tensor) -> Tensor:
    """(B, S, S) bool -> float, softened over about the width of the dilation's ring (12 px of 518)."""
    deviation = 12.0 * regions.shape[-1] / 518
    planes = [
        torch.from_numpy(cv2.GaussianBlur(region.astype(np.float32), (0, 0), deviation))
        for region in regions.cpu().numpy()
    ]
    return torch.stack(planes).to(regions.device)


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability.clamp(0.0, 1.0), eps=1e-6)


def contrast(picture: NDArray[np.uint8], size: Size) -> NDArray[np.float32]:
    """(H, W, 3) RGB -> `size` in [0, 1]: how far each pixel's colour (Lab) is from that of its surroundings."""
    small = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB)
    around = cv2.GaussianBlur(lab, (0, 0), max(size) / 16)
    distance = np.linalg.norm(cv2.GaussianBlur(lab, (0, 0), max(size) / 256) - around, axis=2)
    return np.asarray(np.clip(distance / CONTRAST_SCALE, 0.0, 1.0), np.float32)
