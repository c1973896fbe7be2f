"""CUDA graphs of the static parts: what may be captured, and that a graph which says something else is not used.

A CUDA graph launches again what was launched while it was captured, whatever the tensors hold by then. A trace of the
operations does the same on any device, so it stands in for the graph here: what a part decided by looking into a
tensor, or computed on the host, is baked into both.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import structlog
import torch
from numpy.typing import NDArray
from tiny_bundle import picture, write_tiny_bundle
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from flawline.config.recipe import Recipe
from flawline.models import collaboration, graphs
from flawline.models.collaboration import WARM, CollaborationEngine
from flawline.models.graphs import Graphs, Part
from flawline.models.inspector import Inspector
from flawline.models.stages import StageClock
from flawline.models.switches import Switches
from flawline.models.towers import load_towers

CPU = torch.device("cpu")
SUSPICIOUS = Recipe.model_validate({"prompt": {"region": "top_percent"}})
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Traced:
    """Captures by recording every operation; counts captures and replays, and keeps the recordings."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.operations: list[set[str]] = []

    def __call__(self, part: Part, own: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
        self.captures += 1
        recorded = make_fx(lambda *given: list(part(*given)))(*own)
        self.operations.append({str(node.target) for node in recorded.graph.nodes})
        made = [tensor.clone() for tensor in recorded(*own)]

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(made, recorded(*own), strict=True):
                kept.copy_(new)

        return replay, made


@pytest.fixture(scope="module", autouse=True)
def _a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def with_graphs(inspector: Inspector, capture: Any) -> Inspector:
    """The same models, their static parts captured by `capture`."""
    object.__setattr__(inspector.towers, "graphs", Graphs(CPU, True, capture))
    return inspector


def pictures(count: int, size: tuple[int, int] = (130, 180)) -> list[NDArray[np.uint8]]:
    return [picture(*size, seed) for seed in range(count)]


def recipes() -> list[Any]:
    """Every setting of prompts and cascade that keeps to the device."""
    settings: list[dict[str, Any]] = [
        {},
        {"prompt": {"similarity": "max"}},
        {"prompt": {"similarity": "weighted", "kernel": "rect", "kernel_size": 9}},
        {"prompt": {"spacing_metric": "rank_stride"}},
        {"prompt": {"preset": "literal", "negative_points": 0}},
        {"cascade": {"levels": 2}},
        {"cascade": {"multimask": [False, True, True]}},
        {"tiling": {"enabled": True, "size": 128, "overlap": 16}},
    ]
    made = []
    for given in settings:
        prompt = {"region": "top_percent", **given.get("prompt", {})}
        made.append(Recipe.model_validate(given | {"prompt": prompt}))
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


class Both(NamedTuple):
    """The same models without graphs, and with those of all recipes that were tested so far."""

    plain: Inspector
    replayed: Inspector
    traced: Traced


@pytest.fixture(scope="module")
def both(tiny: Path) -> Both:
    traced = Traced()
    return Both(Inspector.load(tiny, "cpu"), with_graphs(Inspector.load(tiny, "cpu"), traced), traced)


@pytest.mark.parametrize("recipe", recipes(), ids=str)
def test_replayed_frames_are_judged_as_others(both: Both, recipe: Recipe) -> None:
    """Also those that were not there when the graphs were captured: nothing of a frame is baked in."""
    graphs = both.replayed.towers.graphs
    with structlog.testing.capture_logs() as logs:
        for number, image in enumerate(pictures(4)):
            replays, as_they_are = both.traced.replays, graphs.as_they_are
            one, other = both.plain.inspect(image, recipe), both.replayed.inspect(image, recipe)
            assert other.refined
            np.testing.assert_allclose(other.anomaly_map, one.anomaly_map, atol=1e-5)
            assert other.score == pytest.approx(one.score, abs=1e-5)
            if number > 1:  # by then each part has been seen and captured: CLIP, SAM's encoder, prompts, cascade
                assert (both.traced.replays, graphs.as_they_are) == (replays + 4, as_they_are)
    assert not logs


def test_regions_of_their_own_are_not_captured(tiny: Path) -> None:
    """Their number is read on the host."""
    traced = Traced()
    inspector = with_graphs(Inspector.load(tiny, "cpu"), traced)
    recipe = Recipe.model_validate({"prompt": {"region": "top_percent"}, "cascade": {"per_region": True}})
    for image in pictures(4):
        assert inspector.inspect(image, recipe).refined
    assert traced.captures == 2  # the two encoders


def test_recipes_that_only_cut_their_region_in_another_way_share_one_graph(tiny: Path) -> None:
    traced = Traced()
    inspector = with_graphs(Inspector.load(tiny, "cpu"), traced)
    for image in pictures(4):
        for prompt in ({"region": "top_percent"}, {"region": "otsu"}, {"region": "top_percent", "region_percent": 9.0}):
            assert inspector.inspect(image, Recipe.model_validate({"prompt": prompt})).refined
    assert traced.captures == 4


def test_a_frame_in_which_a_graph_is_captured_says_nothing_of_sams_time(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_s = 1000.0  # by this clock; nothing else takes so long
    real = time.monotonic

    class Slow(Traced):
        def __call__(self, part: Part, own: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
            captured = super().__call__(part, own)
            monkeypatch.setattr(collaboration.time, "monotonic", lambda: real() + slow_s * self.captures)
            return captured

    engine, traced = CollaborationEngine(), Slow()
    engine._inspector = with_graphs(Inspector.load(tiny, "cpu"), traced)
    engine.add_recipe("r", SUSPICIOUS)
    engine._warm_up()
    assert traced.captures == 4
    assert engine._sam_s[WARM] < slow_s / 10
    for image in pictures(4):  # another size than that of warming up
        engine.inspect(image, "r", None, lambda _: None)
    assert traced.captures > 4
    assert engine._sam_s["r"] < slow_s / 10


class FakeCuda:
    """As much of `torch.cuda` as capturing uses, on a machine without it: which stream and device are current."""

    def __init__(self) -> None:
        self.stream: Any = "the line's"
        self.devices: list[torch.device] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fake = self

        class Stream:
            def wait_stream(self, _: Any) -> None:
                pass

        class FailsAtItsEnd:
            """Leaves its own stream current, as torch's does when a capture is not valid."""

            def __init__(self, *_: Any, **__: Any) -> None:
                pass

            def __enter__(self) -> None:
                fake.stream = "the capture's"

            def __exit__(self, *_: Any) -> None:
                raise RuntimeError("operation failed due to a previous error during capture")

        @contextlib.contextmanager
        def device(given: torch.device) -> Iterator[None]:
            fake.devices.append(given)
            yield

        @contextlib.contextmanager
        def stream(_: Any) -> Iterator[None]:
            yield

        class Current(Stream):
            pass

        self.stream = current = Current()
        for name, stands_in in {
            "graph_pool_handle": lambda: 1,
            "Stream": Stream,
            "current_stream": lambda: current,
            "stream": stream,
            "device": device,
            "CUDAGraph": object,
            "graph": FailsAtItsEnd,
            "set_stream": lambda given: setattr(fake, "stream", given),
        }.items():
            patch.setattr(torch.cuda, name, stands_in)


def test_a_capture_that_fails_leaves_the_line_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    before = cuda.stream
    kept = Graphs(torch.device("cuda", 1), True)
    with torch.no_grad(), structlog.testing.capture_logs() as logs:
        for n in (1.0, 2.0, 3.0):
            assert kept.run("a", lambda x: [x + 1], torch.full((2,), n))[0].tolist() == [n + 1] * 2
    assert [entry["event"] for entry in logs] == ["graph_left_out"]
    assert cuda.stream is before
    assert cuda.devices == [torch.device("cuda", 1)]
    assert (kept.tries, kept.left_out) == (1, 1)


def test_stages_are_timed_on_the_models_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Event:
        def __init__(self, **_: Any) -> None:
            pass

        def record(self, stream: Any) -> None:
            asked.append(stream)

        def elapsed_time(self, _: Any) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(("waited for", device)))
    device = torch.device("cuda", 1)
    clock = StageClock(device)
    clock.lap("clip")
    assert clock.stages()["clip"] == 2.0
    assert asked == [("stream of", device)] * 3 + [("waited for", device)]


def test_a_shape_is_captured_when_it_comes_again() -> None:
    traced = Traced()
    kept = Graphs(CPU, True, traced)
    with torch.inference_mode():
        for count, captures in ((2, 0), (3, 0), (2, 1), (2, 1), (3, 2)):
            given = torch.full((count,), float(count))
            assert kept.run("a", lambda x: [x + 1], given)[0].tolist() == [count + 1.0] * count
            assert traced.captures == captures
        kept.run("b", lambda x: [x - 1], torch.ones(2))
        assert kept.run("b", lambda x: [x - 1], torch.ones(2))[0].tolist() == [0.0, 0.0]  # another part
    assert kept.run("a", lambda x: [x + 1], torch.ones(2).requires_grad_())[0].requires_grad  # training is left alone


def test_results_are_not_overwritten_by_the_next_frame() -> None:
    kept = Graphs(CPU, True, Traced())
    with torch.no_grad():
        results = [kept.run("a", lambda x: [2 * x], torch.full((3,), float(n)))[0] for n in range(5)]
    assert [result.tolist() for result in results] == [[2.0 * n] * 3 for n in range(5)]


def looks_into_the_tensor(x: Tensor) -> list[Tensor]:
    return [x + 1 if float(x[0]) > 0 else x - 1]


def raises_while_captured(_part: Part, _own: list[Tensor]) -> Any:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


def bakes_in(part: Part, own: list[Tensor]) -> Any:
    """What a graph does whose part decided on the host: it says the same again for everything."""
    made = list(part(*own))
    return lambda: None, made


@pytest.mark.parametrize(
    ("part", "capture", "reason"),
    [
        (lambda x: [x * 3], raises_while_captured, "not permitted when stream is capturing"),
        (lambda x: [x * 3], bakes_in, "it says something else"),
        (looks_into_the_tensor, bakes_in, "it says something else"),
    ],
)
def test_what_cannot_be_captured_goes_on_as_it_is_and_is_told_once(part: Any, capture: Any, reason: str) -> None:
    kept = Graphs(CPU, True, capture)
    with torch.no_grad(), structlog.testing.capture_logs() as logs:
        for n in (1.0, 2.0, -3.0, 4.0):
            given = torch.tensor([n, -n, 0.5])
            assert torch.equal(kept.run(("part", 7), part, given)[0], part(given)[0])
    assert [(entry["event"], entry["part"]) for entry in logs] == [("graph_left_out", "part")]
    assert reason in logs[0]["error"]
    assert "\n" not in logs[0]["error"]


def test_the_number_of_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    traced = Traced()
    kept = Graphs(CPU, True, traced)

    def use(*sizes: int) -> None:
        for size in sizes:
            kept.run("a", lambda x: [x + 1], torch.zeros(size))

    with torch.no_grad():
        use(1, 1, 2, 2, 1, 3, 3)  # 2 was unused for longest
        assert (traced.captures, len(kept._captured)) == (3, 2)
        use(1, 3)
        assert traced.captures == 3
        use(2, 1, 3, 2)  # more shapes than graphs: not one for the other in turn
        assert traced.captures == 3
        for size in range(4, 4 + 2 * graphs.MOST_SHAPES):
            use(size)
        assert len(kept._promising) <= graphs.MOST_SHAPES


@pytest.mark.parametrize(("enabled", "device"), [(True, "cpu"), (False, "cpu"), (False, "cuda")])
def test_without_cuda_or_switched_off_everything_runs_as_it_is(enabled: bool, device: str) -> None:
    kept = Graphs(torch.device(device), enabled)
    calls: list[int] = []
    with torch.no_grad():
        for _ in range(3):
            kept.run("a", lambda x: [calls.append(1), x][1:], torch.zeros(2))
    assert len(calls) == 3


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_replayed_frames_are_judged_as_others(tiny: Path, precision: str) -> None:
    plain = Inspector.load(tiny, "cuda", precision)
    replayed = Inspector(load_towers(tiny, "cuda", precision, Switches(graphs="on")))
    with structlog.testing.capture_logs() as logs:
        for image in pictures(6):
            for recipe in (Recipe(), SUSPICIOUS):
                one, other = plain.inspect(image, recipe), replayed.inspect(image, recipe)
                np.testing.assert_allclose(other.anomaly_map, one.anomaly_map, atol=2e-3)
    assert not logs
    assert len(replayed.towers.graphs._captured) == 4


@needs_cuda
def test_on_a_gpu_replaying_waits_for_nothing() -> None:
    kept = Graphs(torch.device("cuda"), True)
    with torch.inference_mode():
        given = torch.rand(64, 64, device="cuda")
        for _ in range(3):
            kept.run("a", lambda x: [x @ x], given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = kept.run("a", lambda x: [x @ x], given + 1)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(made, (given + 1) @ (given + 1))
