"""The cascade: every level equal to segment_anything's own predictor, frames in batches equal to one by one."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from flawline.config.recipe import CascadeSettings, PromptSettings
from flawline.models.frames import FrameGeometry
from flawline.models.prompt import PointPrompts, point_prompts
from flawline.models.refine import Cascade, MaskRefiner, mask_box, to_frame

SMALL = {"dim": 32, "grid": 8, "mlp": 64, "heads": 4}
MEDIUM = {"dim": 64, "grid": 16, "mlp": 96, "heads": 8}
FULL = {"dim": 256, "grid": 64, "mlp": 2048, "heads": 8}  # as in vit_b, vit_l and vit_h

pytestmark = pytest.mark.usefixtures("no_gradients")


class Patches(torch.nn.Module):
    """A tiny image encoder that SamPredictor.set_image can run."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.img_size = grid * 16
        self.patches = torch.nn.Conv2d(3, dim, 16, 16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.patches(image)


def make_sam(dim: int, grid: int, mlp: int, heads: int, seed: int = 0) -> Any:
    """segment_anything's Sam with every parameter redrawn, none left at zero."""
    sam = Sam(
        Patches(grid, dim),
        PromptEncoder(dim, (grid, grid), (grid * 16, grid * 16), 16),
        MaskDecoder(transformer_dim=dim, transformer=TwoWayTransformer(2, dim, heads, mlp)),
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sam.named_parameters():
        parameter.requires_grad_(False)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn * (0.3 if parameter.dim() == 1 else 1.5 / fan_in**0.5))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
        assert (parameter != 0).all()
    matrix = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    matrix.copy_(torch.randn(matrix.shape, generator=generator))
    return sam


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def predictor_for(sam: Any, image: NDArray[np.uint8]) -> tuple[Any, FrameGeometry]:
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    geometry = FrameGeometry(image.shape[0], image.shape[1], 64, sam.image_encoder.img_size)
    assert predictor.input_size == (geometry.sam_height, geometry.sam_width)
    return predictor, geometry


def prompts_for(
    counts: list[tuple[int, int]], geometry: FrameGeometry, places: tuple[int, int] = (3, 3), seed: int = 1
) -> PointPrompts:
    """Random points in the picture: per frame so many positives and negatives, the rest of the places absent."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(places)
    points = torch.rand(len(counts), n, 2, generator=generator) * torch.tensor([geometry.width, geometry.height])
    labels = torch.tensor([1] * places[0] + [0] * places[1]).repeat(len(counts), 1)
    present = torch.tensor(
        [[i < p for i in range(places[0])] + [i < q for i in range(places[1])] for p, q in counts], dtype=torch.bool
    )
    return PointPrompts(points, labels, present)


def three_predicts(
    predictor: Any, points: NDArray[np.float32], labels: NDArray[np.int64], multimask: tuple[bool, bool, bool]
) -> list[dict[str, Any]]:
    """The cascade by hand, as a user of segment_anything would write it."""
    made: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}
    for level in range(3):
        if level == 2:
            ys, xs = np.nonzero(made[-1]["logits"] > 0)
            if len(xs):
                extra["box"] = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
        logits, scores, low = predictor.predict(
            points, labels, multimask_output=multimask[level], return_logits=True, **extra
        )
        best = int(np.argmax(scores))
        made.append({"logits": logits[best], "low": low[best], "score": scores[best], "index": best} | extra)
        extra = {"mask_input": low[best : best + 1]}
    return made


def assert_same(cascade: Cascade, frame: int, expected: list[dict[str, Any]], tolerance: float = 1e-4) -> None:
    assert len(cascade.levels) == len(expected)
    for level, plain in zip(cascade.levels, expected, strict=True):
        np.testing.assert_allclose(level.logits[frame].numpy(), plain["low"], atol=tolerance, rtol=0)
        ours = level.frame_logits[frame].numpy()
        np.testing.assert_allclose(ours, plain["logits"], atol=tolerance, rtol=0)
        sure = np.abs(plain["logits"]) > 1e-3
        np.testing.assert_array_equal(ours[sure] > 0, plain["logits"][sure] > 0)
        assert int(level.index[frame]) == plain["index"]
        assert float(level.score[frame]) == pytest.approx(float(plain["score"]), abs=tolerance)
    assert cascade.box is not None
    assert cascade.box_present is not None
    box = expected[2].get("box")
    assert bool(cascade.box_present[frame]) == (box is not None)
    np.testing.assert_array_equal(cascade.box[frame].numpy(), np.zeros(4) if box is None else box)


@pytest.mark.parametrize("multimask", [(True, True, True), (False, True, True), (False, False, False)])
@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (90, 61), (60, 97), (33, 200), (301, 300)])
@pytest.mark.parametrize("sizes", [SMALL, MEDIUM], ids=["small", "medium"])
def test_each_level_is_sam_predictors(sizes: Any, shape: tuple[int, int], multimask: tuple[bool, bool, bool]) -> None:
    sam = make_sam(**sizes, seed=shape[0])
    predictor, geometry = predictor_for(sam, picture(*shape))
    prompts = prompts_for([(3, 3)], geometry)
    cascade = MaskRefiner(sam).cascade(predictor.features, prompts, geometry, CascadeSettings(multimask=multimask))
    expected = three_predicts(predictor, prompts.points[0].numpy(), prompts.labels[0].numpy(), multimask)
    assert_same(cascade, 0, expected)


def test_the_random_masks_are_neither_empty_nor_full() -> None:
    """Else equal masks and boxes would say little."""
    shares, boxes = [], set()
    for seed in range(6):
        sam = make_sam(**MEDIUM, seed=seed)
        predictor, geometry = predictor_for(sam, picture(90, 120))
        cascade = MaskRefiner(sam).cascade(
            predictor.features, prompts_for([(3, 3)], geometry), geometry, CascadeSettings()
        )
        shares += [float((level.frame_logits > 0).float().mean()) for level in cascade.levels]
        assert cascade.box is not None
        boxes.add(tuple(cascade.box[0].tolist()))
    assert sum(0.02 < share < 0.98 for share in shares) >= 12
    assert len(boxes) >= 3


def test_a_decoder_of_sams_own_size_at_1024() -> None:
    sam = make_sam(**FULL)
    predictor, geometry = predictor_for(sam, picture(300, 420))
    prompts = prompts_for([(3, 3)], geometry)
    cascade = MaskRefiner(sam).cascade(predictor.features, prompts, geometry, CascadeSettings())
    assert cascade.levels[0].logits.shape == (1, 256, 256)
    multimask = (True, True, True)
    assert_same(cascade, 0, three_predicts(predictor, prompts.points[0].numpy(), prompts.labels[0].numpy(), multimask))


COUNTS = [(p, q) for p, q in itertools.product(range(4), range(4)) if p + q > 0]


def test_absent_points_are_as_if_they_were_not_there() -> None:
    """One to six points in six places, against the predictor given those points only; all in one batch."""
    sam = make_sam(**SMALL, seed=3)
    predictor, geometry = predictor_for(sam, picture(50, 70))
    prompts = prompts_for(COUNTS, geometry)
    prompts.points[~prompts.present] = float("nan")  # whatever stands there
    batch = predictor.features.expand(len(COUNTS), -1, -1, -1)
    cascade = MaskRefiner(sam).cascade(batch, prompts, geometry, CascadeSettings())
    for frame in range(len(COUNTS)):
        points, labels = prompts.of_frame(frame)
        assert_same(cascade, frame, three_predicts(predictor, points.numpy(), labels.numpy(), (True, True, True)))


def test_padding_by_label_would_not_be_the_same() -> None:
    """Why places are hidden from attention and not given segment_anything's label of padding, -1."""
    sam = make_sam(**SMALL, seed=3)
    predictor, geometry = predictor_for(sam, picture(50, 70))
    prompts = prompts_for([(1, 1)], geometry)
    points, labels = prompts.of_frame(0)
    _, _, alone = predictor.predict(points.numpy(), labels.numpy(), return_logits=True)
    padded = np.where(prompts.present[0].numpy(), prompts.labels[0].numpy(), -1)
    _, _, with_padding = predictor.predict(prompts.points[0].numpy(), padded, return_logits=True)
    assert np.abs(alone - with_padding).max() > 1e-2


def test_a_batch_is_its_frames_one_by_one() -> None:
    sam = make_sam(**MEDIUM, seed=4)
    refiner = MaskRefiner(sam)
    geometry = FrameGeometry(80, 110, 64, 256)
    embedding = torch.randn(5, 64, 16, 16, generator=torch.Generator().manual_seed(5))
    prompts = prompts_for([(3, 3), (1, 0), (2, 3), (3, 1), (1, 3)], geometry)
    together = refiner.cascade(embedding, prompts, geometry, CascadeSettings())
    assert together.box is not None
    for frame in range(5):
        one = slice(frame, frame + 1)
        row = PointPrompts(prompts.points[one], prompts.labels[one], prompts.present[one])
        alone = refiner.cascade(embedding[one], row, geometry, CascadeSettings())
        for level, single in zip(together.levels, alone.levels, strict=True):
            torch.testing.assert_close(level.logits[one], single.logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(level.frame_logits[one], single.frame_logits, atol=1e-4, rtol=0)
            assert torch.equal(level.index[one], single.index)
        assert alone.box is not None
        assert torch.equal(together.box[one], alone.box)


def test_decode_with_a_box_for_some_frames_only() -> None:
    sam = make_sam(**SMALL, seed=6)
    predictor, geometry = predictor_for(sam, picture(100, 100))
    refiner = MaskRefiner(sam)
    prompts = prompts_for([(2, 2), (2, 2)], geometry)
    box = np.array([10.0, 20.0, 60.0, 90.0])
    points = geometry.image_to_sam(prompts.points)
    in_sam = geometry.image_to_sam(torch.tensor(box).float().view(2, 2)).flatten()
    boxes = torch.stack([in_sam, torch.full((4,), float("nan"))])
    logits, scores = refiner.decode(
        predictor.features.expand(2, -1, -1, -1),
        points,
        prompts.labels,
        prompts.present,
        boxes,
        torch.tensor([True, False]),
    )
    for frame, given in enumerate((box, None)):
        shown, labels = prompts.of_frame(frame)
        for single in (True, False):
            _, score, low = predictor.predict(shown.numpy(), labels.numpy(), box=given, multimask_output=not single)
            ours = slice(0, 1) if single else slice(1, 4)
            np.testing.assert_allclose(logits[frame, ours].numpy(), low, atol=1e-4, rtol=0)
            np.testing.assert_allclose(scores[frame, ours].numpy(), score, atol=1e-4, rtol=0)


def test_an_empty_second_mask_gives_no_box_and_keeps_the_points() -> None:
    sam = make_sam(**SMALL, seed=7)
    for head in sam.mask_decoder.output_hypernetworks_mlps:  # every logit below zero
        head.layers[-1].weight.mul_(0.01)
        head.layers[-1].bias.copy_(-0.5 - head.layers[-1].bias.abs())
    sam.mask_decoder.output_upscaling[3].bias.fill_(6.0)
    predictor, geometry = predictor_for(sam, picture(70, 90))
    prompts = prompts_for([(2, 1)], geometry)
    cascade = MaskRefiner(sam).cascade(predictor.features, prompts, geometry, CascadeSettings())
    points, labels = prompts.of_frame(0)
    expected = three_predicts(predictor, points.numpy(), labels.numpy(), (True, True, True))
    assert "box" not in expected[2]
    assert_same(cascade, 0, expected)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_cascade_stops_after_any_level(levels: int) -> None:
    sam = make_sam(**SMALL, seed=8)
    predictor, geometry = predictor_for(sam, picture(64, 64))
    prompts = prompts_for([(3, 3)], geometry)
    refiner = MaskRefiner(sam)
    whole = refiner.cascade(predictor.features, prompts, geometry, CascadeSettings())
    part = refiner.cascade(predictor.features, prompts, geometry, CascadeSettings(levels=levels))
    assert len(part.levels) == levels
    assert (part.box is None) == (levels < 3)
    for level, expected in zip(part.levels, whole.levels, strict=False):
        assert torch.equal(level.logits, expected.logits)


def test_one_cascade_per_region_joined_by_the_maximum() -> None:
    sam = make_sam(**MEDIUM, seed=9)
    refiner = MaskRefiner(sam)
    geometry = FrameGeometry(60, 90, 60, 256)
    embedding = torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(10))
    anomaly = torch.rand(2, 60, 60, generator=torch.Generator().manual_seed(11)) * 0.4
    for frame, y, x, high in ((0, 5, 5, 8), (0, 30, 40, 12), (1, 20, 20, 9)):
        anomaly[frame, y : y + high, x : x + 10] += 0.6
    s_a = anomaly >= 0.6
    prompts = point_prompts(anomaly, s_a, embedding, geometry, PromptSettings(), max_regions=8)
    assert prompts.frame is not None
    assert prompts.frame.tolist() == [0, 0, 1]
    joined = refiner.cascade(embedding, prompts, geometry, CascadeSettings(per_region=True))
    rows = []
    for row, frame in enumerate([0, 0, 1]):
        one = slice(row, row + 1)
        single = PointPrompts(prompts.points[one], prompts.labels[one], prompts.present[one])
        rows.append(refiner.cascade(embedding[frame : frame + 1], single, geometry, CascadeSettings()))
    for number, level in enumerate(joined.levels):
        first, second, third = (made.levels[number] for made in rows)
        torch.testing.assert_close(level.logits[:1], torch.maximum(first.logits, second.logits), atol=1e-4, rtol=0)
        torch.testing.assert_close(level.logits[1:], third.logits, atol=1e-4, rtol=0)
        better = max(first, second, key=lambda made: float(made.score))
        assert int(level.index[0]) == int(better.index)
        assert float(level.score[0]) == pytest.approx(float(better.score), abs=1e-4)
    assert joined.box is not None
    boxes = [made.box[0] for made in rows if made.box is not None]
    assert joined.box[0, :2].tolist() == torch.minimum(boxes[0], boxes[1])[:2].tolist()
    assert joined.box[0, 2:].tolist() == torch.maximum(boxes[0], boxes[1])[2:].tolist()
    assert joined.box[1].tolist() == boxes[2].tolist()


def test_boxes_are_those_of_the_marked_pixels() -> None:
    rng = np.random.default_rng(12)
    planes = np.where(rng.random((40, 23, 31)) < rng.choice([0.0, 0.002, 0.01, 0.3], (40, 1, 1)), 1.0, -1.0)
    planes[0, :] = 0.0  # zero is not above zero
    boxes, present = mask_box(torch.from_numpy(planes.astype(np.float32)))
    for plane, box, there in zip(planes, boxes.numpy(), present.tolist(), strict=True):
        ys, xs = np.nonzero(plane > 0)
        assert there == (len(xs) > 0)
        np.testing.assert_array_equal(box, [xs.min(), ys.min(), xs.max(), ys.max()] if len(xs) else [0] * 4)


@pytest.mark.parametrize("shape", [(64, 64), (333, 100), (41, 500)])
def test_the_way_back_to_the_picture_is_sams_postprocessing(shape: tuple[int, int]) -> None:
    sam = make_sam(**SMALL)
    geometry = FrameGeometry(*shape, 64, 128)
    low = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(13))
    expected = sam.postprocess_masks(low[:, None], (geometry.sam_height, geometry.sam_width), shape)[:, 0]
    torch.testing.assert_close(to_frame(low, geometry), expected, atol=1e-6, rtol=0)


def test_half_precision_stays_near_full_precision() -> None:
    sam = make_sam(**MEDIUM, seed=14)
    geometry = FrameGeometry(80, 110, 64, 256)
    embedding = torch.randn(1, 64, 16, 16, generator=torch.Generator().manual_seed(15))
    prompts = prompts_for([(3, 3)], geometry)
    exact = MaskRefiner(sam).cascade(embedding, prompts, geometry, CascadeSettings(levels=1)).levels[0]
    half = copy.deepcopy(sam)
    refiner = MaskRefiner(half)  # before the cast: positions keep their precision
    half.to(torch.bfloat16)
    near = refiner.cascade(embedding, prompts, geometry, CascadeSettings()).levels[0]
    assert near.logits.dtype == torch.float32
    spread = float(exact.logits.std())
    assert float((near.logits - exact.logits).abs().mean()) < 0.05 * spread


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_never_waited_for_and_agrees_with_the_cpu() -> None:
    sam = make_sam(**MEDIUM, seed=16)
    geometry = FrameGeometry(80, 110, 64, 256)
    embedding = torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(17))
    prompts = prompts_for([(3, 3), (1, 2)], geometry)
    expected = MaskRefiner(sam).cascade(embedding, prompts, geometry, CascadeSettings())
    on_gpu = PointPrompts(prompts.points.cuda(), prompts.labels.cuda(), prompts.present.cuda())
    refiner, embedding = MaskRefiner(sam.cuda()), embedding.cuda()
    refiner.cascade(embedding, on_gpu, geometry, CascadeSettings())  # libraries are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cascade = refiner.cascade(embedding, on_gpu, geometry, CascadeSettings())
        frame_logits = cascade.levels[-1].frame_logits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(frame_logits.cpu(), expected.levels[-1].frame_logits, atol=1e-3, rtol=1e-3)
