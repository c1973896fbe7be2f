"""On a CUDA device nothing waits between upload and gate, nor between gate and decision: seen without such a device.

torch's fake tensors say which device a result would lie on, and are refused nothing; a dispatch mode sees every
operation. What would read a value on the host, or send one from it, shows there. That a kernel exists for each
operation and type, they do not show: that takes a GPU (test_graphs.py, test_passes.py).
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flawline.config.recipe import Recipe
from flawline.models import memory, pyramid
from flawline.models.bundle import open_bundle
from flawline.models.clip import DenseClip
from flawline.models.conclude import final_maps
from flawline.models.evidence import Evidence, Refined
from flawline.models.frames import FrameGeometry, fit, squash
from flawline.models.localise import AdapterLocaliser
from flawline.models.memory import placed
from flawline.models.prompt import region
from flawline.models.random_towers import random_bundle
from flawline.models.sam import build_sam
from flawline.models.switches import Switches
from flawline.models.tiles import Tile
from flawline.models.towers import Towers, assemble

CUDA = torch.device("cuda", 0)
HEIGHT, WIDTH = 960, 1280
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "lift_fresh")


@pytest.fixture(autouse=True)
def _no_fake_is_kept() -> Iterator[None]:
    """What a function keeps for a device would be taken for real by other tests where there is a GPU."""
    yield
    memory._places.cache_clear()
    pyramid._nearby.cache_clear()


class Watch(TorchDispatchMode):
    """Notes every operation that takes or gives a tensor of the host's, or reads a value there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
        name = str(function)
        if any(tensor.device.type == "cpu" for tensor in tensors) or any(word in name for word in READS):
            place = next(frame for frame in reversed(traceback.extract_stack()[:-1]) if "torch" not in frame.filename)
            self.waits.append(f"{name} at {place.filename}:{place.lineno}")
        return made


def moved(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that puts new tensors in place of the old ones: a real one's memory cannot become a fake's."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(change(weight.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = change(buffer)
    return module


@contextmanager
def on_cuda(name: str, dtype: torch.dtype, attention: Any, patch: pytest.MonkeyPatch) -> Iterator[Towers]:
    """Towers on a device that need not be there."""
    bundle = open_bundle("demo") if name == "demo" else random_bundle(name, 256, "ViT-S-32", 224)
    manifest = bundle.manifest
    clip = DenseClip(manifest.clip, bundle.folder)
    sam = build_sam(manifest.sam, getattr(clip.model.visual, "trunk", None))
    assert manifest.adapter is not None
    adapter = AdapterLocaliser(
        clip.tap_channels(), clip.embed_dim, manifest.adapter.temperature, manifest.adapter.centred
    )
    patch.setattr(nn.Module, "_apply", moved)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        switches = Switches(attention=attention, batchnorm="plain")
        yield assemble(bundle, clip, sam, adapter.eval(), CUDA, dtype, switches)


class Frame:
    """A suspicious frame on its way; every step is watched by itself."""

    def __init__(self, towers: Towers) -> None:
        self._towers = towers
        self.watches: dict[str, Watch] = {}

    def _step(self, name: str, work: Callable[[], Any]) -> Any:
        self.watches[name] = Watch()
        with self.watches[name]:
            return work()

    def encode(self) -> "Frame":
        """Through the towers."""
        towers, clip = self._towers, self._towers.clip
        self._geometry = FrameGeometry(HEIGHT, WIDTH, clip.input_size, towers.bundle.manifest.sam.input_size)
        picture = torch.empty(1, 3, HEIGHT, WIDTH, dtype=torch.uint8, device=CUDA)
        text = torch.empty(clip.embed_dim, 2, device=CUDA)
        given = self._step("squash", lambda: clip.normalise(squash(picture, clip.input_size)))
        dense = self._step("clip", lambda: towers.dense(given))
        self._maps = self._step("map", lambda: towers.map(dense.taps, given, text, "adapter"))
        fitted = self._step("fit", lambda: fit(picture, self._geometry))
        self._embedding = self._step("encode", lambda: towers.embed(fitted))
        return self

    def judge(self, recipe: Recipe) -> "Frame":
        """What the recipe has a say in, once the frame is encoded."""
        towers, maps, embedding, geometry = self._towers, self._maps, self._embedding, self._geometry
        regions = self._step("region", lambda: region(maps, recipe.prompt, 0.5))
        prompts = self._step("prompt", lambda: towers.prompts(maps, regions, embedding, geometry, recipe.prompt, None))
        cascade = self._step("cascade", lambda: towers.refine(embedding, prompts, geometry, recipe.cascade))
        evidence = Evidence(maps, regions, Refined([0], prompts, cascade))
        final = self._step("fuse", lambda: final_maps(geometry, recipe, evidence))
        assert (final.shape, final.device, final.dtype) == ((1, HEIGHT, WIDTH), CUDA, torch.float32)
        return self

    @property
    def waits(self) -> dict[str, list[str]]:
        """By step, where something waited."""
        return {name: watch.waits for name, watch in self.watches.items() if watch.waits}


@pytest.mark.parametrize(
    ("bundle", "dtype"),
    [
        *(("demo", torch.bfloat16), ("demo", torch.float32)),
        *(("vit_b", torch.bfloat16), ("vit_b", torch.float32), ("vit_t", torch.float16)),
    ],
)
def test_a_suspicious_frame_waits_for_nothing_but_the_gate(
    bundle: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_cuda(bundle, dtype, "auto", monkeypatch) as towers:
        Frame(towers).encode().judge(Recipe())  # what is computed once for a geometry is kept
        frame = Frame(towers).encode().judge(Recipe())
    assert frame.waits == {}
    assert all(watch.operations for watch in frame.watches.values())


def test_nor_does_it_by_any_way_of_prompting(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[dict[str, Any]] = [{"similarity": "max"}, {"similarity": "weighted"}, {"preset": "literal"}]
    ways += [{"region": how, "spacing_metric": "rank_stride"} for how in ("absolute", "otsu", "top_percent")]
    ways += [{"region": how} for how in ("otsu", "top_percent")]
    with on_cuda("demo", torch.float32, "auto", monkeypatch) as towers:
        frame = Frame(towers).encode()
        frame.watches.clear()  # the same whatever the recipe
        for prompt in ways:
            recipe = Recipe.model_validate({"prompt": prompt})
            frame.judge(recipe)
            assert (frame.judge(recipe).waits, prompt) == ({}, prompt)


def test_a_memorys_places_are_sent_to_the_device_once() -> None:
    tile = Tile(slice(0, HEIGHT), slice(0, WIDTH))
    with FakeTensorMode(), torch.no_grad():
        for number in range(2):
            cells = torch.empty(1, 152, 24, 24, device=CUDA)
            with Watch() as watch:
                rows = placed(cells, [tile], (HEIGHT, WIDTH), 3.0)
            assert bool(watch.waits) == (number == 0)
    assert (rows.shape, rows.device) == ((1, 576, 154), CUDA)


def test_the_watch_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """segment_anything's own attention indexes by tensors that it makes on the host."""
    with on_cuda("vit_b", torch.float32, "plain", monkeypatch) as towers:
        assert Frame(towers).encode().waits["encode"]
