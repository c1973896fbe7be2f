"""Static parts of an inspection, replayed as CUDA graphs instead of being launched kernel by kernel.

A static part is a function of tensors that reads nothing on the host: with the same shapes it launches the same
kernels, whatever is in the tensors. `Graphs.run` runs it as it is the first time a shape is seen, captures it the
second time, and replays it from then on. Before a graph is used its results are compared with those of the function,
for the values at hand and for mirrored ones; where they differ, or where capturing fails, the function goes on as it
is and the log says so once. Without CUDA, and with the switch off, the function always runs as it is.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

log = structlog.get_logger()

Part = Callable[..., Sequence[Tensor]]
Capture = Callable[[Part, list[Tensor]], tuple[Callable[[], None], list[Tensor]]]
"""From a part and its fixed inputs: what replays it, and the tensors that its results then stand in."""

MOST_GRAPHS = 16
MOST_SHAPES = 256
CLOSE = 0.01
"""Largest difference from the part's own result, as a share of its largest value."""


@dataclass(frozen=True)
class Captured:
    """One graph with the tensors it reads and writes."""

    replay: Callable[[], None]
    given: list[Tensor]
    made: list[Tensor]

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Results for these values, in tensors of their own."""
        for own, new in zip(self.given, given, strict=True):
            own.copy_(new)
        self.replay()
        return [tensor.clone() for tensor in self.made]


class Graphs:
    """The graphs of one set of models, at most `MOST_GRAPHS`; the one unused for longest gives way, for good.

    `capture` is CUDA's where `enabled` on a CUDA device; another one may be given.
    """

    def __init__(self, device: torch.device, enabled: bool, capture: Capture | None = None) -> None:
        cuda = enabled and device.type == "cuda"
        self._capture = capture if capture is not None else CudaCapture(device) if cuda else None
        self.enabled = self._capture is not None
        self.tries = 0
        """Captures so far, those that failed too. A frame with one in it took longer than others will."""
        self.left_out = 0
        """Captures that failed, or whose graph said something else."""
        self.as_they_are = 0
        """Runs of a part without a graph."""
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._promising: dict[Hashable, bool] = {}  # shapes seen before; False: no graph for this one
        self._lock = threading.Lock()  # a memory is learnt on another thread

    def run(self, key: Hashable, part: Part, *given: Tensor) -> list[Tensor]:
        """The part's results for these tensors. `key` tells apart whatever it depends on besides them."""
        if self._capture is None or torch.is_grad_enabled():
            return list(part(*given))
        shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in given)
        full = (key, shapes, torch.is_inference_mode_enabled())
        with self._lock:
            captured = self._captured.get(full)
            if captured is not None:
                self._captured.move_to_end(full)
                return captured(given)
            if full not in self._promising:
                if len(self._promising) >= MOST_SHAPES:
                    self._promising.clear()
                self._promising[full] = True
            elif self._promising[full]:
                self._try(full, key, part, given, self._capture)
            self.as_they_are += 1
        return list(part(*given))

    def _try(self, full: Hashable, key: Hashable, part: Part, given: Sequence[Tensor], capture: Capture) -> None:
        name = key[0] if isinstance(key, tuple) else key
        self.tries += 1
        try:
            own = [tensor.clone() for tensor in given]
            replay, made = capture(part, own)
            captured = Captured(replay, own, made)
            mirrored = [tensor.flip(-1) for tensor in given]
            if not all(_alike(captured(values), list(part(*values))) for values in (given, mirrored)):
                raise RuntimeError("replayed, it says something else")
        except RuntimeError as error:  # out of memory too: the graphs that there are give theirs back
            self._promising[full] = False
            self._captured.clear()
            self.left_out += 1
            log.warning("graph_left_out", part=str(name), error=str(error).splitlines()[0])
            return
        self._captured[full] = captured
        if len(self._captured) > MOST_GRAPHS:
            unused, _ = self._captured.popitem(last=False)
            self._promising[unused] = False  # where there are more shapes than graphs, capturing in turn costs the most


def _alike(made: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Waits for the device."""
    for one, other in zip(made, expected, strict=True):
        if torch.equal(one, other):
            continue
        if not one.is_floating_point() or one.shape != other.shape:
            return False
        largest = float(other.float().abs().nan_to_num(posinf=0.0).max())
        if not torch.allclose(one.float(), other.float(), rtol=0.0, atol=CLOSE * largest, equal_nan=True):
            return False
    return True


class CudaCapture:
    """`torch.cuda.graph`, after two runs on a stream beside, in one pool of memory for all graphs.

    They share it because never two run at once and results are copied out before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._beside: torch.cuda.Stream | None = None

    def __call__(self, part: Part, own: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
        """See `Capture`."""
        with torch.cuda.device(self._device):  # streams and graphs are those of the current device
            if self._beside is None:
                self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            self._beside.wait_stream(current)
            with torch.cuda.stream(self._beside):
                for _ in range(2):
                    part(*own)
            current.wait_stream(self._beside)
            graph = torch.cuda.CUDAGraph()
            try:
                # another thread may learn meanwhile: what it does must not end the capture
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    made = list(part(*own))
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
        return graph.replay, made
