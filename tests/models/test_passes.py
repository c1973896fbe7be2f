"""How often the image encoders run, over how many tiles at once, and when the host waits for the device."""

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_bundle import picture, write_tiny_bundle
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flawline.config.recipe import Recipe
from flawline.models.collaboration import CollaborationEngine
from flawline.models.conclude import final_maps
from flawline.models.engine import Judgement
from flawline.models.evidence import Evidence
from flawline.models.inspector import Inspector

Picture = NDArray[np.uint8]
CLEAN = Recipe.model_validate({"prompt": {"region_threshold": 1.0}})
SUSPICIOUS = Recipe.model_validate({"prompt": {"region_threshold": 0.0}})
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def inspector(folder: Path) -> Inspector:
    return Inspector.load(folder, device="cpu")


def passes(module: torch.nn.Module) -> list[int]:
    """Fills up with the number of pictures of every forward of the module."""
    seen: list[int] = []
    module.register_forward_hook(lambda _module, given, _made: seen.append(len(given[0])))
    return seen


def clip_passes(inspector: Inspector) -> list[int]:
    """The same of CLIP's image tower, whose forward is not called as such: by its first layer."""
    return passes(inspector.towers.clip.model.visual.conv1)


def some_suspicious(inspector: Inspector, pictures: list[Picture], **more: Any) -> Recipe:
    """A recipe under which the first picture is suspicious and the last one is not."""
    tops = [float(inspector.trace(image, CLEAN).clip_map.max()) for image in pictures]
    assert tops[0] > tops[-1]
    return Recipe.model_validate({"prompt": {"region_threshold": (tops[0] + tops[-1]) / 2}} | more)


@pytest.mark.parametrize(("recipe", "runs"), [(CLEAN, []), (SUSPICIOUS, [1])])
def test_sam_encodes_a_suspicious_frame_once_and_a_clean_one_never(
    inspector: Inspector, recipe: Recipe, runs: list[int]
) -> None:
    encoder, clip = passes(inspector.towers.sam.image_encoder), clip_passes(inspector)
    result = inspector.inspect(picture(90, 120), recipe)
    assert result.refined == bool(runs)
    assert encoder == runs
    assert clip == [1]
    inspector.trace(picture(90, 120), recipe)
    assert encoder == runs * 2


def test_judging_again_by_another_recipe_encodes_nothing_again(inspector: Inspector) -> None:
    encoder, clip = passes(inspector.towers.sam.image_encoder), clip_passes(inspector)
    encoded = inspector.encode([picture(90, 120)], SUSPICIOUS)
    for levels in (1, 2, 3):
        inspector.judge(
            encoded, SUSPICIOUS.model_copy(update={"cascade": Recipe().cascade.model_copy(update={"levels": levels})})
        )
    assert (encoder, clip) == ([1], [1])


@pytest.mark.parametrize(
    ("key", "limit_s", "runs", "first"),
    [("bad", None, 1, 0), ("bad", 3600.0, 1, 0), ("bad", 30.0, 1, 1), ("good", 30.0, 0, 0), ("good", None, 0, 0)],
)
def test_with_a_deadline_too_the_encoder_runs_once_and_the_gate_is_read_once(
    folder: Path, key: str, limit_s: float | None, runs: int, first: int
) -> None:
    engine = CollaborationEngine()
    engine.load(str(folder), "cpu", "fp32", 1, {"good": CLEAN, "bad": SUSPICIOUS})
    engine._sam_s = {"": 600.0}  # so long, the engine believes, does SAM take
    encoder = passes(engine._inspector.towers.sam.image_encoder)
    clip = clip_passes(engine._inspector)
    early: list[Judgement] = []
    image = picture(128, 128)
    deadline = None if limit_s is None else time.monotonic() + limit_s
    with HostReads() as reads:
        judgement = engine.inspect(image, key, deadline, early.append)
    assert (len(encoder), len(clip), len(early)) == (runs, 1, first)
    assert all(one.result.degraded for one in early)
    assert judgement.result.refined == bool(runs)
    assert reads.seen[0] == "tolist"
    assert reads.seen.count("tolist") == 1


@pytest.mark.parametrize(("localiser", "threshold"), [("adapter", 0.0), ("windows", 1.0)])
def test_tiles_in_passes_say_what_they_say_all_at_once(inspector: Inspector, localiser: str, threshold: float) -> None:
    """By the adapter with SAM on every tile; by windows without it, for their map has plateaus, on which points tip."""
    image = picture(300, 430)
    tiling = {"enabled": True, "size": 128, "overlap": 32}
    recipe = Recipe.model_validate(
        {"tiling": tiling, "localiser": localiser, "prompt": {"region_threshold": threshold}, "threshold": 0.6}
    )
    encoder, clip = passes(inspector.towers.sam.image_encoder), clip_passes(inspector)
    inspector.tile_batch = 100
    whole = inspector.inspect(image, recipe)
    assert clip == [15]
    assert encoder == ([15] if whole.refined else [])
    assert whole.refined == (localiser == "adapter")
    for most in (5, 4, 1):
        encoder.clear()
        clip.clear()
        inspector.tile_batch = most
        result = inspector.inspect(image, recipe)
        assert clip == [min(most, 15 - start) for start in range(0, 15, most)]
        assert encoder == (clip if whole.refined else [])
        np.testing.assert_allclose(result.anomaly_map, whole.anomaly_map, atol=2e-5)
        assert result.score == pytest.approx(whole.score, abs=2e-5)


def test_by_default_a_large_frame_is_encoded_in_passes(inspector: Inspector) -> None:
    encoder = passes(inspector.towers.sam.image_encoder)
    recipe = Recipe.model_validate(
        {"tiling": {"enabled": True, "size": 128, "overlap": 0}, **SUSPICIOUS.model_dump(include={"prompt"})}
    )
    inspector.inspect(picture(384, 512), recipe)
    assert sum(encoder) == 12
    assert max(encoder) == Inspector.tile_batch < 12


class HostReads(TorchFunctionMode):
    """Records every call that would make the host wait for a device: values read, and indices by lists or masks."""

    READS = frozenset(
        {"tolist", "item", "numpy", "cpu", "nonzero", "masked_select", "__bool__", "__int__", "__float__", "__index__"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", ""))
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        for one in index if isinstance(index, tuple) else (index,):
            if isinstance(one, list) or (isinstance(one, Tensor) and one.dtype == torch.bool):
                self.seen.append(f"{name} by {type(one).__name__}")
        if name in self.READS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def batch_of_three() -> list[Picture]:
    """128 x 128, the size of the tiny SAM's frame: nothing is resized for it by a library of the host."""
    return [picture(128, 128), picture(128, 128, 1), np.full((128, 128, 3), 128, np.uint8)]


@pytest.mark.parametrize("all_of_them", [True, False])
def test_from_the_upload_to_the_final_map_only_the_gate_is_read(inspector: Inspector, all_of_them: bool) -> None:
    pictures = batch_of_three()
    more = {"ignore": [(5, 5, 20, 20)]}
    recipe = (
        Recipe.model_validate(SUSPICIOUS.model_dump() | more)
        if all_of_them
        else some_suspicious(inspector, pictures, **more)
    )
    prepared = inspector.prepare(recipe)
    with HostReads() as reads, torch.inference_mode():
        encoded = inspector.encode(pictures, recipe)
        evidence = inspector.evidence(encoded, recipe)
        final = final_maps(encoded.geometry, recipe, evidence)
    assert reads.seen == ["tolist"]
    assert evidence.refined is not None
    assert (len(evidence.refined.rows) == 3) == all_of_them
    for row, result in enumerate(inspector.decide(encoded, evidence, prepared.recipe)):
        inside = np.ones((128, 128), bool)
        inside[5:25, 5:25] = False
        np.testing.assert_array_equal(final[row].numpy()[inside], result.anomaly_map[inside])


def test_masks_of_ignored_boxes_are_made_once_per_recipe_and_size(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    plain: Callable[..., Tensor] = Inspector._not_ignored
    monkeypatch.setattr(Inspector, "_not_ignored", staticmethod(lambda *given: (made.append(1), plain(*given))[1]))
    one, other = (Recipe.model_validate({"ignore": [box]}) for box in ((5, 5, 20, 20), (5, 5, 20, 40)))
    for recipe, size, count in ((one, 128, 1), (one, 128, 1), (other, 128, 2), (one, 100, 3), (other, 128, 3)):
        box = recipe.ignore[0]
        trace = inspector.trace(picture(size, size), recipe)
        hidden = trace.clip_map == 0.0
        rows, columns = np.nonzero(hidden)
        step = 64 / size
        assert hidden.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert (columns.min(), columns.max() + 1) == (round(5 * step), round(25 * step))
        assert (rows.min(), rows.max() + 1) == (round(5 * step), round((5 + box[3]) * step))
        assert len(made) == count


@needs_cuda
def test_on_a_gpu_only_the_gate_is_waited_for_and_all_is_as_on_the_cpu(
    folder: Path, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = batch_of_three()
    recipe = some_suspicious(inspector, pictures, ignore=[(5, 5, 20, 20)])
    on_gpu = Inspector.load(folder, "cuda", "fp32")
    on_gpu.inspect_batch(pictures, recipe)  # libraries are loaded, text features and masks are there
    plain = Evidence.__dict__["suspicious"].func

    def gate(evidence: Evidence) -> list[int]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return list(plain(evidence))
        finally:
            torch.cuda.set_sync_debug_mode("error")

    allowed = cached_property(gate)
    allowed.__set_name__(Evidence, "suspicious")
    monkeypatch.setattr(Evidence, "suspicious", allowed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            encoded = on_gpu.encode(pictures, recipe)
            evidence = on_gpu.evidence(encoded, recipe)
            final = final_maps(encoded.geometry, recipe, evidence)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert final.device.type == "cuda"
    for one, other in zip(
        on_gpu.decide(encoded, evidence, recipe), inspector.inspect_batch(pictures, recipe), strict=True
    ):
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=0.02)  # frames differ by two grey levels
        assert one.refined == other.refined
        assert one.score == pytest.approx(other.score, abs=0.02)
