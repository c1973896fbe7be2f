"""From the evidence to the results: fusion, tiles joined to frames, decision."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flawline.config.recipe import Recipe
from flawline.models.decide import as_float32, blank_ignored, components, decide, peak
from flawline.models.evidence import Encoded, Evidence, Prepared, Refined, pick, points_in_frame
from flawline.models.frames import FrameGeometry
from flawline.models.fuse import fuse, map_in_frame, region_in_frame
from flawline.models.results import CascadeStage, InspectionResult

Warnings = Callable[[], Sequence[str | None]]
"""One for every picture, or None. Reads on the host, so it is asked when everything has been launched."""


def conclude(encoded: Encoded, prepared: Prepared, evidence: Evidence, warn: Warnings) -> list[InspectionResult]:
    """The result of every picture."""
    recipe, refined = prepared.recipe, evidence.refined
    final = final_maps(encoded.geometry, recipe, evidence)
    warnings = warn()
    planes = final.cpu().numpy()
    ran = set(refined.rows) if refined is not None else set()
    stage_ms = encoded.clock.stages()
    results = []
    for picture in range(encoded.count):
        whole = stitch(encoded, recipe, planes, picture)
        mask, defects, score = decide(whole, recipe, prepared.threshold)
        here = range(picture * len(encoded.tiles), (picture + 1) * len(encoded.tiles))
        results.append(
            InspectionResult(
                whole,
                mask,
                score,
                prepared.threshold,
                defects,
                stage_ms,
                refined=any(row in ran for row in here),
                warning=warnings[picture],
            )
        )
    return results


def final_maps(geometry: FrameGeometry, recipe: Recipe, evidence: Evidence) -> Tensor:
    """(B, h, w) float32, A of every tile, still on the device and not waited for."""
    maps, refined = evidence.maps, evidence.refined
    if refined is None:
        return fuse(map_in_frame(maps, geometry), None, recipe.fusion)
    located = map_in_frame(pick(maps, refined.rows), geometry)
    fused = fuse(located, refined.cascade.levels[-1].frame_logits, recipe.fusion)
    if len(refined.rows) == len(maps):
        return fused
    final = fuse(map_in_frame(maps, geometry), None, recipe.fusion)
    for place, row in enumerate(refined.rows):
        final[row] = fused[place]
    return final


def conclude_by_clip(
    encoded: Encoded, prepared: Prepared, evidence: Evidence, warn: Warnings
) -> list[InspectionResult]:
    """The same from CLIP's map alone: the defects are the components of S_a, the results are `degraded`."""
    recipe, geometry, maps, regions = prepared.recipe, encoded.geometry, evidence.maps, evidence.regions
    enlarged, cut_out = map_in_frame(maps, geometry), region_in_frame(regions, geometry).float()
    warnings = warn()
    located, marked = enlarged.cpu().numpy(), cut_out.cpu().numpy()
    stage_ms = encoded.clock.stages()
    results = []
    for picture in range(encoded.count):
        own = slice(picture * len(encoded.tiles), (picture + 1) * len(encoded.tiles))
        threshold = prepared.region_threshold
        if recipe.prompt.region != "absolute" and bool(regions[own].any()):
            threshold = float(maps[own][regions[own]].min())
        whole = stitch(encoded, recipe, located, picture)
        peak(whole)  # before anything takes a value that is no number for a small one
        inside = stitch(encoded, recipe, marked, picture)
        # Enlarging may lower a peak a little: inside S_a the map says at least what S_a was cut at.
        cut = as_float32(threshold)
        whole = np.where(inside > 0, np.maximum(whole, cut), np.minimum(whole, np.nextafter(cut, np.float32(-1))))
        mask, defects = components(whole, threshold, 1, recipe.mm_per_px)
        score = float(whole.max(initial=0.0))
        results.append(
            InspectionResult(whole, mask, score, threshold, defects, stage_ms, degraded=True, warning=warnings[picture])
        )
    return results


def stitch(encoded: Encoded, recipe: Recipe, planes: NDArray[np.float32], picture: int) -> NDArray[np.float32]:
    """(B, h, w) of tiles -> (H, W) of the frame: the larger value where tiles overlap, zero outside them."""
    tiles = encoded.tiles
    if len(tiles) == 1 and (tiles[0].height, tiles[0].width) == (encoded.height, encoded.width):
        whole = np.ascontiguousarray(planes[picture])
    else:
        whole = np.zeros((encoded.height, encoded.width), np.float32)
        for number, tile in enumerate(tiles):
            target = whole[tile.rows, tile.columns]
            np.maximum(target, planes[picture * len(tiles) + number], out=target)
    blank_ignored(recipe, whole)
    return whole


def trace_of_sam(encoded: Encoded, refined: Refined | None) -> dict[str, Any]:
    """What PPG and CPS did with one picture of one tile, as `InspectionTrace` names it."""
    if refined is None:
        empty = np.zeros((0, 2), np.float32)
        return {
            "sam_embedding": None,
            "points": empty,
            "labels": np.zeros(0, np.int64),
            "box": None,
            "stages": [],
        }
    tile = encoded.tiles[0]
    points, labels = points_in_frame(encoded, refined, 0)
    offset = np.array([tile.columns.start, tile.rows.start], np.float32)
    stages = []
    for level in refined.cascade.levels:
        mask = np.zeros((encoded.height, encoded.width), bool)
        mask[tile.rows, tile.columns] = (level.frame_logits[0] > 0).cpu().numpy()
        logits = level.logits[0].float().cpu().numpy()
        stages.append(CascadeStage(logits, mask, float(level.score[0]), int(level.index[0])))
    box, box_present = None, refined.cascade.box_present
    if refined.cascade.box is not None and box_present is not None and bool(box_present[0]):
        box = refined.cascade.box[0].float().cpu().numpy() + np.tile(offset, 2)
    return {
        "sam_embedding": encoded.embeddings[0].cpu().numpy(),
        "points": points,
        "labels": labels,
        "box": box,
        "stages": stages,
    }
