"""Judging by several processes or machines through Ray (extra `ray`): the same maps in the same order.

Every actor loads the bundle itself, from the same folder on every machine; pictures are read where they are
judged, so the data set's paths must be the same everywhere too. Maps come back in order, a bounded number ahead.
"""

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.recipe import Recipe
from flawline.models.adapter_file import with_adapter
from flawline.models.datasets import Sample
from flawline.models.evaluate import score
from flawline.models.ground_truth import read_rgb
from flawline.models.inspector import Inspector
from flawline.models.map_store import Judged
from flawline.models.peers import PeerSpec, load_peers
from flawline.models.ray_head import LocalHead
from flawline.models.row_maps import RowMaps
from flawline.models.study import Row

AHEAD = 2  # pictures per actor that are under way
PICTURE_LIMIT_S = 1800.0  # so long one picture may take, the start of its actor and the loading of models included


class Shard:
    """One actor: a bundle of its own, judging the pictures it is given."""

    def __init__(
        self, bundle: str, adapter: str | None, device: str, precision: str, peers: Sequence[PeerSpec], dataset: str
    ) -> None:
        self._inspector = Inspector.load(bundle, device=device, precision=precision)
        if adapter is not None:
            self._inspector = Inspector(with_adapter(self._inspector.towers, Path(adapter)))
        self._peers = load_peers(peers, self._inspector.towers.device, dataset)
        self._maps: tuple[Recipe, RowMaps] | None = None

    def judge(self, sample: Sample, rows: Sequence[Row], recipe: Recipe, size: int | None) -> Judged:
        """The maps and scores of one picture."""
        if self._maps is None or self._maps[0] != recipe:
            self._maps = (recipe, RowMaps(self._inspector, rows, recipe, size, self._peers))
        return score(self._maps[1](read_rgb(sample.image)), recipe.min_defect_area_px)


class RayCluster:
    """The actors, for as long as the `with` block lasts; Ray is left as it was found."""

    def __init__(
        self,
        bundle: Path,
        adapter: Path | None,
        device: str,
        precision: str,
        shards: int,
        peers: Sequence[PeerSpec] = (),
        dataset: str = "folder",
    ) -> None:
        """Joins the cluster that RAY_ADDRESS names, else starts one on this machine. Raises FlawlineError."""
        if find_spec("ray") is None:  # an optional extra
            raise ConfigError("--engine ray needs Ray: pip install 'flawline[ray]'")
        already = sys.modules.get("ray")
        self._joined = already is None or not already.is_initialized()
        self._head = LocalHead() if self._joined and not os.environ.get("RAY_ADDRESS") else None
        import ray  # slow, and it looks for the head's token

        self._ray: Any = ray
        self._shards: list[Any] = []
        if self._head is not None:
            self._head.start(ray, shards)
        elif self._joined:
            ray.init(log_to_driver=False, logging_level="ERROR")
        there = ray.cluster_resources()
        if there.get("CPU", 0) < shards:
            self.__exit__()
            raise ConfigError(f"--shards {shards}: the Ray cluster has {there.get('CPU', 0):g} CPUs, one is for each")
        # Several may share a GPU; an actor that asks for none would not see one.
        each = there.get("GPU", 0)
        gpus = 1 / math.ceil(shards / each) if device != "cpu" and each else 0
        actor = ray.remote(num_cpus=1, num_gpus=gpus)(Shard)
        where = (str(bundle.resolve()), None if adapter is None else str(adapter.resolve()), device, precision)
        methods = [spec.resolved() for spec in peers]
        self._shards = [actor.remote(*where, methods, dataset) for _ in range(shards)]

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._shards:
            self._ray.kill(shard)
        if self._joined:
            self._ray.shutdown()
        if self._head is not None:
            self._head.close()

    def judge(
        self, rows: Sequence[Row], recipe: Recipe, size: int | None
    ) -> Callable[[Iterable[Sample]], Iterator[Judged]]:
        """What turns the pictures of one class into maps."""

        def judge_all(samples: Iterable[Sample]) -> Iterator[Judged]:
            under_way: deque[Any] = deque()
            for number, sample in enumerate(samples):
                if len(under_way) >= AHEAD * len(self._shards):
                    yield self._fetch(under_way.popleft())
                resolved = Sample(sample.image.resolve(), sample.mask, sample.defect)
                shard = self._shards[number % len(self._shards)]
                under_way.append(shard.judge.remote(resolved, list(rows), recipe, size))
            while under_way:
                yield self._fetch(under_way.popleft())

        return judge_all

    def _fetch(self, reference: Any) -> Judged:
        exceptions = self._ray.exceptions
        try:
            judged: Judged = self._ray.get(reference, timeout=PICTURE_LIMIT_S)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FlawlineError):
                raise cause from error
            raise FlawlineError(f"--engine ray: a shard failed: {cause!r}") from error
        except exceptions.RayError as error:
            raise FlawlineError(f"--engine ray: a shard was lost: {error}") from error
        return judged
