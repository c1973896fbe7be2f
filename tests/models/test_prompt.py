"""Point prompts: held against a slow, plain version of the equations, over random maps."""

import itertools
import math
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flawline.config.recipe import PromptSettings
from flawline.models.frames import FrameGeometry
from flawline.models.morphology import connected_parts, dilate
from flawline.models.prompt import (
    kernel_size,
    negative_points,
    point_prompts,
    positive_points,
    region,
    ring,
    similarity,
)

SHAPES = {"ellipse": cv2.MORPH_ELLIPSE, "rect": cv2.MORPH_RECT, "cross": cv2.MORPH_CROSS}
quickly = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.usefixtures("no_gradients")


# --- the plain version, pixel by pixel, in double precision ---------------------------------------------


def plain_distance(a: tuple[int, int], b: tuple[int, int], size: int, geo: FrameGeometry, frame: str) -> float:
    """Distance of two CLIP pixels (x, y), in pixels of the 518 px CLIP frame or the 1024 px SAM frame."""
    if frame == "clip":
        return math.hypot(a[0] - b[0], a[1] - b[1]) * 518 / size
    in_picture = [(p[0] * geo.width / size, p[1] * geo.height / size) for p in (a, b)]
    scale = 1024 / max(geo.width, geo.height)
    return math.hypot(in_picture[0][0] - in_picture[1][0], in_picture[0][1] - in_picture[1][1]) * scale


def plain_similarity(
    features: NDArray[np.float64], anomaly: NDArray[np.float64], marked: NDArray[np.bool_], geo: FrameGeometry, how: str
) -> NDArray[np.float64]:
    """Equation 6 in loops: for every CLIP pixel the cosine of F there with F_a."""
    _, h, w = features.shape
    size = len(marked)
    shown_rows, shown_columns = geo.sam_height * h / geo.sam_size, geo.sam_width * w / geo.sam_size
    rows = max(1, sum(row + 0.5 < shown_rows for row in range(h)))
    columns = max(1, sum(column + 0.5 < shown_columns for column in range(w)))
    weight = np.zeros((rows, columns))
    for y, x in zip(*np.nonzero(marked), strict=True):
        top, bottom = y * shown_rows / size, (y + 1) * shown_rows / size
        left, right = x * shown_columns / size, (x + 1) * shown_columns / size
        for row, column in itertools.product(range(rows), range(columns)):
            row_end = shown_rows if row == rows - 1 else row + 1
            column_end = shown_columns if column == columns - 1 else column + 1
            tall, wide = min(bottom, row_end) - max(top, row), min(right, column_end) - max(left, column)
            if tall > 1e-9 and wide > 1e-9:
                weight[row, column] += tall * wide * (anomaly[y, x] if how == "weighted" else 1.0)
    unit = features / np.linalg.norm(features, axis=0)
    alike = np.zeros((rows, columns))
    inside = [(r, c) for r, c in itertools.product(range(rows), range(columns)) if weight[r, c] > 0]
    for row, column in itertools.product(range(rows), range(columns)):
        if how == "max":
            alike[row, column] = max((unit[:, r, c] @ unit[:, row, column] for r, c in inside), default=0.0)
            continue
        total = sum(
            (features[:, r, c] * (weight[r, c] if how == "weighted" else 1.0) for r, c in inside),
            start=np.zeros(len(features)),
        )
        alike[row, column] = total @ unit[:, row, column] / max(float(np.linalg.norm(total)), 1e-12)
    plane = np.zeros((size, size))
    for y, x in itertools.product(range(size), range(size)):
        at_y = min(max((y + 0.5) * shown_rows / size - 0.5, 0.0), rows - 1.0)
        at_x = min(max((x + 0.5) * shown_columns / size - 0.5, 0.0), columns - 1.0)
        r, c = min(int(at_y), max(rows - 2, 0)), min(int(at_x), max(columns - 2, 0))
        r1, c1 = min(r + 1, rows - 1), min(c + 1, columns - 1)
        v, u = at_y - r, at_x - c
        plane[y, x] = (1 - v) * ((1 - u) * alike[r, c] + u * alike[r, c1])
        plane[y, x] += v * ((1 - u) * alike[r1, c] + u * alike[r1, c1])
    return plane


def assert_greedy(
    chosen: list[tuple[int, int]],
    count: int,
    score: NDArray[np.float64],
    allowed: NDArray[np.bool_],
    geo: FrameGeometry,
    prompt: PromptSettings,
    tolerance: float,
) -> None:
    """Every choice is allowed, keeps its distance from those before, and nothing better was left."""
    size = len(score)
    limit = math.sqrt(prompt.spacing) if prompt.spacing_metric == "sq_euclid" else prompt.spacing
    frame = prompt.spacing_frame
    if prompt.preset == "literal":
        limit, frame = 400.0, "sam"
    # where the picture's size in SAM's frame was rounded, so are distances there
    slack = 1e-6 + (limit * 1.0 / min(geo.sam_width, geo.sam_height) if frame == "sam" else 0.0)
    before: list[tuple[int, int]] = []
    for step in range(count):
        free = [
            (int(x), int(y))
            for y, x in zip(*np.nonzero(allowed), strict=True)
            if all(plain_distance((x, y), p, size, geo, frame) > limit + slack and (x, y) != p for p in before)
        ]
        if step == len(chosen):
            assert not free, f"stopped at {step} points although {free[0]} was free"
            return
        x, y = chosen[step]
        assert allowed[y, x]
        assert all(plain_distance((x, y), p, size, geo, frame) >= limit - slack for p in before)
        assert (x, y) not in before
        assert score[y, x] >= max((score[b, a] for a, b in free), default=-np.inf) - tolerance
        before.append((x, y))


@st.composite
def scenes(draw: Any) -> tuple[NDArray[np.float32], FrameGeometry, NDArray[np.float32], float]:
    """A map with few or many levels, a frame's geometry, features over the padded frame, and a threshold."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(8, 26))
    coarse = rng.random((draw(st.integers(1, 8)),) * 2).astype(np.float32)
    anomaly = cv2.resize(coarse, (size, size), interpolation=draw(st.sampled_from([cv2.INTER_LINEAR, cv2.INTER_CUBIC])))
    anomaly = np.clip(anomaly + rng.normal(0, draw(st.sampled_from([0.0, 0.1])), anomaly.shape), 0, 1)
    anomaly = np.round(anomaly, draw(st.sampled_from([1, 6]))).astype(np.float32)  # one decimal makes ties
    height, width = draw(st.tuples(st.integers(20, 90), st.integers(20, 90)))
    geo = FrameGeometry(height, width, size, 16 * draw(st.integers(2, 8)))
    grid = geo.sam_size // 16
    features = rng.normal(0.2, 1.0, (6, grid, grid)).astype(np.float32)
    return anomaly, geo, features, draw(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]))


prompts = st.builds(
    PromptSettings,
    preset=st.sampled_from(["default", "default", "literal"]),
    positive_points=st.integers(1, 6),
    negative_points=st.integers(1, 6),
    spacing=st.sampled_from([0.0, 20.0, 60.0, 150.0, 400.0]),
    spacing_metric=st.sampled_from(["euclid", "sq_euclid"]),
    spacing_frame=st.sampled_from(["clip", "sam"]),
    kernel=st.sampled_from(["ellipse", "rect", "cross"]),
    kernel_size=st.integers(3, 255),
    similarity=st.sampled_from(["mean", "max", "weighted"]),
)


@quickly
@given(scenes(), prompts)
def test_points_follow_the_equations(scene: Any, prompt: PromptSettings) -> None:
    anomaly, geo, features, threshold = scene
    size = len(anomaly)
    map_a = torch.from_numpy(anomaly)[None]
    s_a = region(map_a, prompt, threshold)
    plain_s_a = anomaly >= np.float32(threshold)
    np.testing.assert_array_equal(s_a[0].numpy(), plain_s_a)

    n_a = ring(s_a, prompt)
    kernel = max(3, math.floor(prompt.kernel_size * size / 518 + 0.5))
    element = cv2.getStructuringElement(SHAPES[prompt.kernel], (kernel, kernel))
    plain_n_a = (cv2.dilate(plain_s_a.astype(np.uint8), element) > 0) & ~plain_s_a
    np.testing.assert_array_equal(n_a[0].numpy(), plain_n_a)

    places = positive_points(map_a, s_a, geo, prompt)
    positive = [tuple(p) for p in places.points[0][places.present[0]].tolist()]
    assert_greedy(positive, prompt.positive_points, anomaly.astype(float), plain_s_a, geo, prompt, 0.0)

    f = torch.from_numpy(features)[None]
    alike = plain_similarity(features.astype(float), anomaly.astype(float), plain_s_a, geo, prompt.similarity)
    if plain_s_a.any():
        ours = similarity(f, map_a, s_a, geo, prompt)[0].numpy()
        np.testing.assert_allclose(ours, alike, atol=2e-5)
    places = negative_points(f, map_a, s_a, n_a, geo, prompt)
    negative = [tuple(p) for p in places.points[0][places.present[0]].tolist()]
    assert_greedy(negative, prompt.negative_points, -alike, plain_n_a, geo, prompt, 4e-5)

    made = point_prompts(map_a, s_a, f, geo, prompt)
    assert made.points.shape == (1, prompt.positive_points + prompt.negative_points, 2)
    points, labels = made.of_frame(0)
    assert labels.tolist() == [1] * len(positive) + [0] * len(negative)
    for (x, y), (a, b) in zip(points.tolist(), positive + negative, strict=True):
        assert x == pytest.approx(min(max((a + 0.5) * geo.width / size - 0.5, 0), geo.width - 1), abs=1e-4)
        assert y == pytest.approx(min(max((b + 0.5) * geo.height / size - 0.5, 0), geo.height - 1), abs=1e-4)


@quickly
@given(scenes(), st.integers(1, 6), st.sampled_from([1.0, 7.0, 40.0]), st.sampled_from([10.0, 400.0, 20000.0]))
def test_rank_stride_takes_every_nth_of_the_ranking(scene: Any, k: int, percent: float, spacing: float) -> None:
    anomaly, geo, _, _ = scene
    prompt = PromptSettings(
        region="top_percent", region_percent=percent, positive_points=k, spacing=spacing, spacing_metric="rank_stride"
    )
    map_a = torch.from_numpy(anomaly)[None]
    s_a = region(map_a, prompt, 0.5)
    pixels = anomaly.size
    wanted = max(1, math.floor(pixels * percent / 100 + 0.5))
    counted = int((anomaly > 0).sum())  # ignored boxes are zero
    assert s_a.sum() >= min(wanted, counted)
    if not counted:
        return
    assert (anomaly > anomaly[s_a[0].numpy()].min()).sum() < wanted  # no more than ties at the edge
    ranking = sorted(zip(*np.nonzero(s_a[0].numpy()), strict=True), key=lambda place: (-anomaly[place], place))
    stride = max(1, math.floor(spacing * pixels / 518**2 + 0.5))
    places = positive_points(map_a, s_a, geo, prompt)
    chosen = [(y, x) for x, y in places.points[0][places.present[0]].tolist()]
    assert chosen == [(int(y), int(x)) for y, x in ranking[::stride][:k]]


def test_a_place_at_just_the_spacing_is_far_enough() -> None:
    anomaly = torch.zeros(1, 518, 518)
    anomaly[0, 100, [100, 119, 120, 139]] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    places = positive_points(anomaly, anomaly > 0.5, FrameGeometry(518, 518, 518, 1024), PromptSettings())
    assert places.points[0][places.present[0]].tolist() == [[100, 100], [120, 100]]


@pytest.mark.parametrize("shape", ["ellipse", "rect", "cross"])
@pytest.mark.parametrize("size", range(3, 32))
def test_dilation_is_opencvs(shape: str, size: int) -> None:
    rng = np.random.default_rng(size)
    masks = rng.random((4, 40, 53)) < np.array([0.002, 0.01, 0.05, 0.5])[:, None, None]
    masks[0, 0, 0] = masks[0, -1, -1] = True  # even sizes are not symmetric about their anchor
    element = cv2.getStructuringElement(SHAPES[shape], (size, size))
    expected = [cv2.dilate(mask.astype(np.uint8), element) for mask in masks]
    np.testing.assert_array_equal(dilate(torch.from_numpy(masks), shape, size).numpy(), np.stack(expected) > 0)


def test_large_dilations_do_not_lose_count() -> None:
    mask = np.ones((3, 900), bool)  # 256 marked pixels in a run look like none to a counter of one byte
    mask[:, :20] = mask[:, 880:] = False
    for size in (255, 256, 300):
        element = cv2.getStructuringElement(cv2.MORPH_RECT, (size, size))
        expected = cv2.dilate(mask.astype(np.uint8), element) > 0
        np.testing.assert_array_equal(dilate(torch.from_numpy(mask)[None], "rect", size)[0].numpy(), expected)


@pytest.mark.parametrize(("size", "expected"), [(518, 25), (1036, 50), (320, 15), (240, 12), (30, 3)])
def test_the_kernel_scales_with_the_input_size(size: int, expected: int) -> None:
    assert kernel_size(PromptSettings(), size) == expected
    s_a = torch.zeros(1, size, size, dtype=torch.bool)
    s_a[0, size // 2, size // 2] = True
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (expected, expected))
    assert ring(s_a, PromptSettings()).sum() == element.sum() - 1


def test_otsu_is_opencvs_and_finds_nothing_in_a_flat_map() -> None:
    rng = np.random.default_rng(1)
    for separation in (0.0, 0.2, 0.5):
        grey = np.clip(rng.normal(60, 20, (40, 40)) + 255 * separation * (rng.random((40, 40)) < 0.2), 1, 255)
        grey = grey.round().astype(np.uint8)
        _, expected = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        ours = region(torch.from_numpy(grey / np.float32(255))[None], PromptSettings(region="otsu"), 0.5)
        np.testing.assert_array_equal(ours[0].numpy(), expected > 0)
    assert not region(torch.full((2, 9, 9), 0.4), PromptSettings(region="otsu"), 0.5).any()


def test_ignored_pixels_count_neither_for_otsu_nor_for_a_share() -> None:
    anomaly = torch.rand(1, 60, 60, generator=torch.Generator().manual_seed(2)) * 0.05 + 0.1
    anomaly[0, 30:36, 30:36] = 0.9
    ignored = anomaly.clone()
    ignored[0, :, :25] = 0.0
    for cut in (PromptSettings(region="otsu"), PromptSettings(region="top_percent", region_percent=1.0)):
        assert torch.equal(region(ignored, cut, 0.5), region(anomaly, cut, 0.5))
        assert region(ignored, cut, 0.5).sum() == 36
    ignored = anomaly.clone()
    ignored[0, :, 1:] = 0.0
    assert region(ignored, PromptSettings(region="top_percent", region_percent=50.0), 0.5).sum() == 60
    assert not region(torch.zeros(1, 9, 9), PromptSettings(region="top_percent"), 0.5).any()


def test_the_recipes_own_region_threshold_goes_before_the_bundles() -> None:
    anomaly = torch.tensor([[[0.1, 0.4], [0.6, 0.9]]])
    assert region(anomaly, PromptSettings(), 0.5).sum() == 2
    assert region(anomaly, PromptSettings(region_threshold=0.3), 0.5).sum() == 3


PROMPT = PromptSettings()
GEO = FrameGeometry(60, 100, 40, 128)


def features_of(seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_no_region_no_points() -> None:
    made = point_prompts(torch.zeros(1, 40, 40), torch.zeros(1, 40, 40, dtype=torch.bool), features_of(1), GEO, PROMPT)
    assert not made.present.any()
    assert (made.points == 0).all()


def test_a_region_everywhere_leaves_positives_only() -> None:
    anomaly = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(2))
    made = point_prompts(anomaly, torch.ones(1, 40, 40, dtype=torch.bool), features_of(1), GEO, PROMPT)
    assert made.present.tolist() == [[True] * 3 + [False] * 3]


@pytest.mark.parametrize("corner", [(0, 0), (0, 39), (39, 0), (39, 39), (17, 23)])
def test_one_pixel_is_enough(corner: tuple[int, int]) -> None:
    anomaly = torch.zeros(1, 40, 40)
    anomaly[0, corner[0], corner[1]] = 0.8
    s_a = region(anomaly, PROMPT, 0.5)
    made = point_prompts(anomaly, s_a, features_of(3), GEO, PROMPT)
    assert made.present[0, :3].tolist() == [True, False, False]
    assert made.present[0, 3]
    x, y = made.points[0, 0].tolist()
    assert (x, y) == pytest.approx(((corner[1] + 0.5) * 2.5 - 0.5, (corner[0] + 0.5) * 1.5 - 0.5), abs=1e-4)


def test_what_lies_in_sams_padding_has_no_influence() -> None:
    anomaly = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(4))
    s_a = region(anomaly, PROMPT, 0.9)
    clean, spoilt = features_of(5), features_of(5)
    rows = math.ceil(GEO.sam_height / 16 - 0.5)
    assert rows == 5  # 60 of 100 rows: 4.8 of 8 cells
    spoilt[:, :, rows:] = float("nan")
    for how in ("mean", "max", "weighted"):
        prompt = PromptSettings(similarity=how)
        expected, made = (point_prompts(anomaly, s_a, f, GEO, prompt) for f in (clean, spoilt))
        assert torch.equal(made.points, expected.points)
        assert made.present[0, 3:].any()


def test_negatives_lie_where_the_features_differ_most() -> None:
    """A wide picture: a straight resize of masks to the square grid would look at the wrong cells."""
    geo = FrameGeometry(200, 400, 100, 128)  # shown in the upper half of SAM's frame
    features = torch.zeros(1, 2, 8, 8)
    features[:, 0] = 1.0
    features[:, 0, 2, 5], features[:, 1, 2, 5] = -1.0, 0.2  # one cell unlike all others
    anomaly = torch.zeros(1, 100, 100)
    anomaly[0, 52:56, 52:60] = 1.0  # SAM cells: rows 2.1 to 2.2, columns 4.2 to 4.8
    prompt = PromptSettings(kernel_size=120, negative_points=1)
    made = point_prompts(anomaly, region(anomaly, prompt, 0.5), features, geo, prompt)
    x, y = made.points[0, -1].tolist()
    # the ring ends 12 pixels beyond S_a, at column 71, short of the cell's centre at column 68.75: it holds it
    assert (x / 400 * 8, y / 200 * 4) == pytest.approx((5.5, 2.5), abs=0.2)


def test_a_batch_is_its_frames_one_by_one() -> None:
    anomaly = torch.rand(5, 40, 40, generator=torch.Generator().manual_seed(6))
    anomaly[1] *= 0.1  # nothing above the threshold
    s_a = region(anomaly, PROMPT, 0.95)
    features = features_of(7, 5)
    for how in ("mean", "max", "weighted"):
        prompt = PromptSettings(similarity=how)
        together = point_prompts(anomaly, s_a, features, GEO, prompt)
        for frame in range(5):
            one = slice(frame, frame + 1)
            alone = point_prompts(anomaly[one], s_a[one], features[one], GEO, prompt)
            assert torch.equal(together.present[one], alone.present)
            torch.testing.assert_close(together.points[one], alone.points)


def test_one_row_per_connected_region() -> None:
    anomaly = torch.zeros(2, 40, 40)
    anomaly[0, 2:6, 2:6] = 0.7
    anomaly[0, 6, 6] = 0.9  # touches by its corner: the same region
    anomaly[0, 12:22, 2:12] = 0.8
    anomaly[0, 35, 35] = 1.0
    s_a = region(anomaly, PROMPT, 0.5)
    parts, frame = connected_parts(s_a, 2)
    assert frame.tolist() == [0, 0, 1]  # the second frame has nothing, and one empty row
    assert [int(part.sum()) for part in parts] == [100, 17, 0]
    prompt = PromptSettings(kernel_size=255)  # 20 pixels here: each ring covers the other region
    made = point_prompts(anomaly, s_a, features_of(8, 2), GEO, prompt, max_regions=2)
    assert made.frame is not None
    assert made.frame.tolist() == [0, 0, 1]
    assert not made.present[2].any()
    for row in range(2):
        for (x, y), label, there in zip(made.points[row], made.labels[row], made.present[row], strict=True):
            column, line = int((x + 0.5) / 2.5), int((y + 0.5) / 1.5)
            if there and label == 1:
                assert parts[row, line, column]
            elif there:
                assert not s_a[0, line, column]
    points, labels = made.of_frame(0)
    assert len(points) == len(labels) == int(made.present[:2].sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_never_waited_for_and_agrees_with_the_cpu() -> None:
    anomaly = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(9))
    features = features_of(10, 3)
    expected = point_prompts(anomaly, region(anomaly, PROMPT, 0.95), features, GEO, PROMPT)
    on_gpu, features_on_gpu = anomaly.cuda(), features.cuda()
    point_prompts(on_gpu, region(on_gpu, PROMPT, 0.95), features_on_gpu, GEO, PROMPT)  # libraries are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = point_prompts(on_gpu, region(on_gpu, PROMPT, 0.95), features_on_gpu, GEO, PROMPT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made.present.cpu(), expected.present)
    torch.testing.assert_close(made.points.cpu(), expected.points)
