"""The inspector as a whole, on a tiny bundle with random weights: batches, tiles, regions, score, trace."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_bundle import picture, write_tiny_bundle
from torch.nn import functional

from flawline.config.errors import ConfigError, FlawlineError, ImageError
from flawline.config.recipe import Recipe
from flawline.models.decide import decide
from flawline.models.inspector import Inspector
from flawline.models.results import Defect, InspectionResult
from flawline.models.tiles import cut_tiles

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module", autouse=True)
def _a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def inspector(folder: Path) -> Inspector:
    return Inspector.load(folder, device="cpu")


def recipe_for(inspector: Inspector, image: Picture, share: float = 0.03, **more: Any) -> Recipe:
    """A recipe under which this share of the picture's map is S_a and some of the final map is defective."""
    at = float(np.quantile(inspector.trace(image, Recipe()).clip_map, 1.0 - share))
    probe = Recipe.model_validate({"prompt": {"region_threshold": at}})
    threshold = float(np.quantile(inspector.inspect(image, probe).anomaly_map, 0.97))
    return Recipe.model_validate({"prompt": {"region_threshold": at}, "threshold": threshold} | more)


def components(binary: NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    """8-connected components by walking from pixel to pixel."""
    left = {(int(y), int(x)) for y, x in np.argwhere(binary)}
    found = []
    while left:
        front, component = [left.pop()], set()
        while front:
            y, x = front.pop()
            component.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        found.append(component)
    return found


def boxes(parts: list[set[tuple[int, int]]]) -> list[tuple[int, int, int, int, int]]:
    """x, y, w, h, area of each, sorted."""
    result = []
    for part in parts:
        rows, columns = [y for y, _ in part], [x for _, x in part]
        x, y = min(columns), min(rows)
        result.append((x, y, max(columns) - x + 1, max(rows) - y + 1, len(part)))
    return sorted(result)


def said(defects: list[Defect]) -> list[tuple[int, int, int, int, int]]:
    return sorted((*defect.bbox, defect.area_px) for defect in defects)


def assert_same(one: InspectionResult, other: InspectionResult) -> None:
    np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=2e-5)
    clear = np.abs(one.anomaly_map - one.threshold) > 1e-4
    assert (one.mask == other.mask)[clear].all()
    assert one.score == pytest.approx(other.score, abs=2e-5)
    assert (one.refined, one.degraded) == (other.refined, other.degraded)


def test_a_batch_says_what_its_pictures_say_one_by_one(inspector: Inspector) -> None:
    pictures = [picture(70, 90, seed) for seed in range(3)]
    pictures.append(np.full((70, 90, 3), 128, np.uint8))
    recipe = recipe_for(inspector, pictures[0])
    together = inspector.inspect_batch(pictures, recipe)
    assert any(result.defects for result in together)
    for image, result in zip(pictures, together, strict=True):
        assert_same(result, inspector.inspect(image, recipe))


@pytest.mark.parametrize("region", ["absolute", "otsu", "top_percent"])
def test_a_batch_judged_by_clip_alone_says_what_its_pictures_say(inspector: Inspector, region: str) -> None:
    pictures = [picture(64, 64, seed) for seed in (1, 2)]
    recipe = recipe_for(inspector, pictures[0])
    recipe = recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update={"region": region})})
    together = inspector.judge(inspector.encode(pictures, recipe), recipe, clip_only=True)
    for image, result in zip(pictures, together, strict=True):
        (alone,) = inspector.judge(inspector.encode([image], recipe), recipe, clip_only=True)
        assert result.threshold == pytest.approx(alone.threshold, abs=1e-6)
        assert said(result.defects) == said(alone.defects)
        assert result.defects or region == "absolute"


def test_one_tile_is_the_whole(inspector: Inspector) -> None:
    image = picture(150, 200)
    recipe = recipe_for(inspector, image)
    tiled = Recipe.model_validate(recipe.model_dump() | {"tiling": {"enabled": True, "size": 200, "overlap": 16}})
    one, other = inspector.inspect(image, recipe), inspector.inspect(image, tiled)
    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    assert said(one.defects) == said(other.defects)


@pytest.mark.parametrize("localiser", ["adapter", "windows"])
def test_tile_by_tile_gives_the_same_result_with_one_tile_in_a_tower(folder: Path, localiser: str) -> None:
    inspector = Inspector.load(folder, device="cpu")
    tiling = {"enabled": True, "size": 128, "overlap": 16}
    recipe = Recipe.model_validate({"localiser": localiser, "tiling": tiling, "prompt": {"region_threshold": 0.0}})
    image = picture(200, 300)
    at_once = inspector.inspect(image, recipe)
    seen: list[int] = []
    inspector.towers.sam.image_encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    inspector.tile_batch = 1
    one_by_one = inspector.inspect(image, recipe)
    assert set(seen) == {1}
    assert len(seen) > 3
    assert at_once.refined
    assert one_by_one.refined
    np.testing.assert_allclose(one_by_one.anomaly_map, at_once.anomaly_map, atol=1e-4)


def test_tiles_cover_a_large_frame_and_its_defects_lie_in_the_frame(inspector: Inspector) -> None:
    image = picture(300, 430)
    tile = image[:128, :128]
    recipe = recipe_for(inspector, tile, min_defect_area_px=5)
    tiled = Recipe.model_validate(recipe.model_dump() | {"tiling": {"enabled": True, "size": 128, "overlap": 32}})
    result = inspector.inspect(image, tiled)
    expected = np.full((300, 430), -1.0, np.float32)
    for place in cut_tiles(slice(0, 300), slice(0, 430), tiled.tiling):
        part = inspector.inspect(np.ascontiguousarray(image[place.rows, place.columns]), recipe)
        target = expected[place.rows, place.columns]
        np.maximum(target, part.anomaly_map, out=target)
    assert expected.min() >= 0.0  # every pixel was seen
    np.testing.assert_allclose(result.anomaly_map, expected, atol=2e-5)
    assert result.defects
    parts = [part for part in components(result.anomaly_map >= result.threshold) if len(part) >= 5]
    assert said(result.defects) == boxes(parts)
    assert max(defect.bbox[0] for defect in result.defects) > 128


@settings(deadline=None)
@given(length=st.integers(1, 900), start=st.integers(0, 50), size=st.integers(128, 300), overlap=st.integers(0, 64))
def test_tiles_cover_every_line_with_the_overlap(length: int, start: int, size: int, overlap: int) -> None:
    tiling = Recipe.model_validate({"tiling": {"enabled": True, "size": size, "overlap": overlap}}).tiling
    tiles = cut_tiles(slice(start, start + length), slice(0, 1), tiling)
    spans = [(tile.rows.start, tile.rows.stop) for tile in tiles]
    assert spans[0][0] == start
    assert spans[-1][1] == start + length
    assert {stop - first for first, stop in spans} == {min(size, length)}
    for (_, stop), (following, _) in itertools.pairwise(spans):
        assert stop - following >= overlap


def test_outside_the_roi_nothing_counts_and_inside_it_is_the_crop(inspector: Inspector) -> None:
    image = picture(120, 160)
    x, y, w, h = roi = (30, 20, 90, 70)
    crop = np.ascontiguousarray(image[y : y + h, x : x + w])
    recipe = recipe_for(inspector, crop)
    result = inspector.inspect(image, Recipe.model_validate(recipe.model_dump() | {"roi": roi}))
    alone = inspector.inspect(crop, recipe)
    np.testing.assert_allclose(result.anomaly_map[y : y + h, x : x + w], alone.anomaly_map, atol=2e-5)
    outside = np.ones((120, 160), bool)
    outside[y : y + h, x : x + w] = False
    assert not result.anomaly_map[outside].any()
    assert result.mask.shape == (120, 160)
    assert alone.defects
    assert said(result.defects) == [(a + x, b + y, c, d, e) for a, b, c, d, e in said(alone.defects)]
    trace = inspector.trace(image, Recipe.model_validate(recipe.model_dump() | {"roi": roi}))
    assert (trace.points >= (x, y)).all()
    assert (trace.points < (x + w, y + h)).all()
    with pytest.raises(ImageError, match="roi"):
        inspector.inspect(image, Recipe.model_validate({"roi": (500, 0, 10, 10)}))


@pytest.mark.parametrize(
    ("shape", "recipe", "reason"),
    [
        ((120, 160), {"roi": (0, 0, 4, 4)}, "leave 16 to be judged"),
        ((120, 160), {"roi": (156, 0, 100, 4)}, "leave 16 to be judged"),
        ((120, 160), {"ignore": ((0, 0, 160, 120),)}, "leave 0 to be judged"),
        ((120, 160), {"min_defect_area_px": 120 * 160 + 1}, "min_defect_area_px = 19201"),
        ((4, 4), {}, "leave 16 to be judged"),
        ((4, 400), {"roi": (0, 1, 400, 1)}, "400 x 1 pixels"),
    ],
)
def test_where_no_defect_could_be_found_nothing_passes(
    inspector: Inspector, shape: tuple[int, int], recipe: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        inspector.inspect(picture(*shape), Recipe.model_validate(recipe))


def test_a_region_that_reaches_beyond_the_frame_is_judged_with_a_warning(inspector: Inspector) -> None:
    image = picture(120, 160)
    result = inspector.inspect(image, Recipe(roi=(30, 20, 131, 100)))
    assert "reaches beyond the frame of 160 x 120 pixels" in str(result.warning)
    assert inspector.inspect(image, Recipe(roi=(30, 20, 130, 100))).warning is None


def test_ignored_boxes_count_nothing_and_prompt_nothing(inspector: Inspector) -> None:
    image = picture(128, 128)
    recipe = recipe_for(inspector, image)
    before = inspector.trace(image, recipe)
    x, y, w, h = box = before.result.defects[0].bbox
    ignoring = Recipe.model_validate(recipe.model_dump() | {"ignore": [box]})
    after = inspector.trace(image, ignoring)
    assert not after.result.anomaly_map[y : y + h, x : x + w].any()
    assert not after.result.mask[y : y + h, x : x + w].any()
    positive = after.points[after.labels == 1]
    inside = ((positive >= (x + 1, y + 1)) & (positive < (x + w - 1, y + h - 1))).all(axis=1)
    assert not inside.any()


MAPS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(2, 40)).map(
    lambda t: (np.random.default_rng(t[2]).integers(0, t[3], t[:2]) / (t[3] - 1)).astype(np.float32)
)


@settings(max_examples=200, deadline=None)
@given(anomaly_map=MAPS, min_area=st.integers(1, 20), threshold=st.floats(0.001, 1.0))
def test_the_score_is_the_largest_threshold_with_a_defect(
    anomaly_map: NDArray[np.float32], min_area: int, threshold: float
) -> None:
    recipe = Recipe(min_defect_area_px=min_area)
    mask, defects, score = decide(anomaly_map, recipe, threshold)
    best = 0.0
    for value in np.unique(anomaly_map[anomaly_map > 0]):
        if any(len(part) >= min_area for part in components(anomaly_map >= value)):
            best = float(value)
    assert score == best
    assert bool(defects) == (score >= threshold)
    parts = [part for part in components(anomaly_map.astype(np.float64) >= threshold) if len(part) >= min_area]
    assert said(defects) == boxes(parts)
    assert {(int(y), int(x)) for y, x in np.argwhere(mask)} == set().union(*parts)
    for defect in defects:
        x, y, w, h = defect.bbox
        (part,) = [p for p in parts if boxes([p]) == [(x, y, w, h, defect.area_px)]][:1]
        if len([p for p in parts if boxes([p]) == boxes([part])]) == 1:
            assert defect.score == max(float(anomaly_map[place]) for place in part)
            assert defect.centroid == pytest.approx(tuple(np.mean([(b, a) for a, b in part], axis=0)))


@pytest.mark.parametrize("half", ["embed", "_map"])
def test_a_part_whose_map_is_no_number_never_passes(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    image = picture(64, 64)
    recipe = recipe_for(inspector, image)
    if half == "_map":
        made = inspector._map
        monkeypatch.setattr(inspector, "_map", lambda *given: made(*given) * float("nan"))
    else:
        decode = inspector.towers.refiner.decode
        monkeypatch.setattr(
            inspector.towers.refiner, "decode", lambda *given: (decode(*given)[0] * float("nan"), decode(*given)[1])
        )
    for inspect in (inspector.inspect, inspector.trace):
        with pytest.raises(FlawlineError, match="no numbers"):
            inspect(image, recipe)
    encoded = inspector.encode([image], recipe)
    if half == "_map":
        with pytest.raises(FlawlineError, match="no numbers"):
            inspector.judge(encoded, recipe, clip_only=True)
    else:
        assert inspector.judge(encoded, recipe, clip_only=True)[0].degraded


def test_what_does_not_count_is_no_defect_at_a_threshold_of_zero(inspector: Inspector) -> None:
    recipe = Recipe(threshold=0.0, roi=(50, 50, 100, 100), ignore=((50, 50, 100, 30),))
    result = inspector.inspect(picture(300, 400), recipe)
    assert result.mask.any()
    assert not result.passed
    rows, columns = np.nonzero(result.mask)
    assert (rows.min(), columns.min()) >= (80, 50)
    assert (rows.max(), columns.max()) <= (149, 149)


def test_a_defects_area_has_a_scale(inspector: Inspector) -> None:
    image = picture(64, 64)
    recipe = recipe_for(inspector, image, mm_per_px=0.5)
    for defect in inspector.inspect(image, recipe).defects:
        assert defect.area_mm2 == pytest.approx(defect.area_px * 0.25)
        assert defect["area_mm2"] == defect.area_mm2
    plain = inspector.inspect(image, recipe_for(inspector, image)).defects
    assert [defect.keys() for defect in plain] == [{"bbox", "area_px", "centroid", "score"}] * len(plain)
    for defect in plain:
        assert json.loads(json.dumps(defect)) == defect  # as it goes on the wire
        assert (tuple(defect["bbox"]), defect["score"]) == (defect.bbox, defect.score)


def test_forms_of_pictures(inspector: Inspector) -> None:
    grey = picture(50, 60)[:, :, 0]
    same = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(inspector.inspect(grey).anomaly_map, inspector.inspect(same).anomaly_map)
    strided = picture(60, 50).transpose(1, 0, 2)[::-1]
    plain = np.ascontiguousarray(strided)
    np.testing.assert_array_equal(inspector.inspect(strided).anomaly_map, inspector.inspect(plain).anomaly_map)
    for wrong in (
        same.astype(np.uint16),
        same.astype(np.float32),
        np.zeros((50, 60, 4), np.uint8),
        np.zeros((0, 60, 3), np.uint8),
        np.zeros((1, 1000, 3), np.uint8),
        same.tolist(),
    ):
        with pytest.raises(ImageError):
            inspector.inspect(wrong)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="same size"):
        inspector.inspect_batch([same, picture(50, 61)])
    with pytest.raises(ImageError):
        inspector.inspect_batch([])


@pytest.mark.parametrize("size", [(64, 64), (90, 150), (150, 60)])
def test_a_trace_keeps_the_contract_and_explains_the_map(inspector: Inspector, size: tuple[int, int]) -> None:
    height, width = size
    image = picture(height, width, 3)
    recipe = recipe_for(inspector, image)
    trace = inspector.trace(image, recipe)
    assert trace.clip_map.shape == trace.region.shape == (64, 64)
    assert trace.clip_map.dtype == np.float32
    result = inspector.inspect(image, recipe)
    assert np.array_equal(trace.anomaly_map, result.anomaly_map)
    assert np.array_equal(trace.mask, result.mask)
    assert (trace.score, trace.threshold, trace.passed) == (result.score, result.threshold, result.passed)
    assert trace.defects == result.defects
    assert trace.stage_ms.keys() == result.stage_ms.keys()
    assert trace.sam_embedding is not None
    assert trace.sam_embedding.shape == (32, 16, 16)
    assert trace.points.shape == (len(trace.labels), 2)
    assert set(trace.labels.tolist()) <= {0, 1}
    assert (trace.points >= 0).all()
    assert (trace.points <= (width - 1, height - 1)).all()
    assert [stage.logits.shape for stage in trace.stages] == [(64, 64)] * 3
    assert all(stage.index in (0, 1, 2) and isinstance(stage.score, float) for stage in trace.stages)
    assert trace.box is None or trace.box.shape == (4,)

    long = max(height, width)
    shown = (int(height * 128 / long + 0.5), int(width * 128 / long + 0.5))
    planes = []
    for stage in trace.stages:
        logits = torch.from_numpy(stage.logits)[None, None]
        plane = inspector.towers.sam.postprocess_masks(logits, shown, size)[0, 0].numpy()
        clear = np.abs(plane) > 1e-3
        assert (stage.mask == (plane > 0))[clear].all()
        planes.append(plane)
    if trace.stages[1].mask.any():
        rows, columns = np.nonzero(trace.stages[1].mask)
        assert trace.box is not None
        assert trace.box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
    located = functional.interpolate(torch.from_numpy(trace.clip_map)[None, None], size, mode="bilinear")[0, 0].numpy()
    probability = 1.0 / (1.0 + np.exp(-planes[-1].astype(np.float64)))
    expected = 1.0 - (1.0 - located) * (1.0 - 0.5 * probability)
    np.testing.assert_allclose(trace.result.anomaly_map, expected, atol=1e-4)
    assert_same(trace.result, inspector.inspect(image, recipe))


def test_where_the_region_is_empty_sam_does_not_run(inspector: Inspector) -> None:
    image = picture(80, 100)
    trace = inspector.trace(image, Recipe.model_validate({"prompt": {"region_threshold": 1.0}}))
    assert not trace.region.any()
    assert trace.points.shape == (0, 2)
    assert trace.labels.shape == (0,)
    assert trace.stages == []
    assert trace.box is None
    assert trace.sam_embedding is None
    assert not trace.result.refined
    assert trace.result.stage_ms["encode"] == 0.0
    located = functional.interpolate(torch.from_numpy(trace.clip_map)[None, None], (80, 100), mode="bilinear")[0, 0]
    np.testing.assert_allclose(trace.result.anomaly_map, located.numpy(), atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2])
def test_by_clip_alone_the_defects_are_the_components_of_the_region(inspector: Inspector, factor: int) -> None:
    image = picture(64 * factor, 64 * factor, 5)
    recipe = recipe_for(inspector, image)
    (result,) = inspector.judge(inspector.encode([image], recipe), recipe, clip_only=True)
    region = np.kron(inspector.trace(image, recipe).region, np.ones((factor, factor), bool))
    assert region.any()
    assert result.degraded
    assert not result.refined
    assert said(result.defects) == boxes(components(region))
    np.testing.assert_array_equal(result.mask, region)
    assert result.score >= result.threshold


def test_a_trace_of_tiles_is_refused(inspector: Inspector) -> None:
    tiled = Recipe.model_validate({"tiling": {"enabled": True, "size": 128, "overlap": 0}})
    with pytest.raises(ConfigError, match="tiling"):
        inspector.trace(picture(200, 200), tiled)
