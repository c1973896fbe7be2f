"""The commands learn.start, learn.status, learn.commit, learn.discard: a memory from the parts of the running line."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from flawline.agent.commands import Command, integer, text
from flawline.agent.recipes import RecipeBook
from flawline.agent.verdict import ActiveRecipe, Job
from flawline.agent.wire import Header
from flawline.agent.worker_client import WorkerClient
from flawline.config.errors import ConfigError
from flawline.models.good_parts import MOST_GOOD_PARTS

log = structlog.get_logger()
Change = Callable[[list[str], str, Header], Awaitable[tuple[ActiveRecipe, float]]]


class Learning:
    """One collection at a time. The worker holds the features; here is counted whose pictures it takes.

    Whoever starts it answers for it that the next parts of the camera are good; an outlier among them is shown
    and left out. The memory judges from the commit on: the frames before it by the recipe's version before it.
    """

    def __init__(self, recipes: RecipeBook, worker: WorkerClient, change: Change, folder: Path) -> None:
        self._recipes = recipes
        self._worker = worker
        self._change = change
        self._folder = folder
        self._camera: str | None = None
        self._recipe = ""
        self._wanted = 0
        self._under_way: set[int] = set()  # jobs whose pictures the worker was asked to take
        self._report: Header = {}
        self._pid: int | None = None
        self._committing = False
        worker.on_collected = self._on_collected

    @property
    def table(self) -> dict[str, Command]:
        """The commands by name."""
        return {
            "learn.start": self._start,
            "learn.status": self._status,
            "learn.commit": self._commit,
            "learn.discard": self._discard,
        }

    def wants(self, job: Job) -> str | None:
        """What the worker shall call this job's picture in the memory; None where it is not to be learnt from."""
        if job.camera != self._camera or self._committing or self._lost or job.recipe.id != self._recipe:
            return None
        if job.number not in self._under_way and self._collected + len(self._under_way) >= self._wanted:
            return None
        self._under_way.add(job.number)
        return f"{job.camera} frame {job.frame_id}"

    @property
    def _collected(self) -> int:
        return int(self._report.get("collected", 0))

    @property
    def _lost(self) -> bool:
        return self._worker.pid != self._pid

    def _on_collected(self, job: int, report: Header) -> None:
        self._under_way.discard(job)
        if "collected" in report:  # else it was discarded in the meantime
            self._report = report

    async def _start(self, request: Header) -> Header:
        """`camera`, and `count`: the next so many parts."""
        camera, count = text(request, "camera", 64), integer(request, "count", 1)
        if count > MOST_GOOD_PARTS:
            raise ValueError(f"count must be at most {MOST_GOOD_PARTS}")
        if self._camera is not None:
            raise ValueError(f"camera {self._camera!r} is learning: learn.commit or learn.discard first")
        if camera not in self._recipes.status():
            raise ConfigError(f"camera: there is no {camera!r} (there are: {', '.join(self._recipes.status())})")
        active = self._recipes.of(camera)
        await self._worker.learn("start", {"key": active.key, "recipe": active.id})
        self._camera, self._recipe, self._wanted, self._pid = camera, active.id, count, self._worker.pid
        self._under_way, self._report = set(), {}
        log.info("learning", camera=camera, recipe=active.id, count=count)
        return await self._status(request)

    async def _status(self, _: Header) -> Header:
        if self._camera is None:
            return {"state": "idle"}
        done = self._collected >= self._wanted
        state = "lost" if self._lost else "committing" if self._committing else "ready" if done else "collecting"
        return {
            "state": state,
            "camera": self._camera,
            "recipe": self._recipe,
            "wanted": self._wanted,
            "collected": self._collected,
            "refused": self._report.get("refused", []),
            "refusals": self._report.get("refusals", 0),
        }

    async def _commit(self, request: Header) -> Header:
        """Make the memory of what was collected and judge by it; the recipe gets a new version.

        `keep_all` (left out: false) keeps the outliers.
        """
        camera, keep_all = self._begun(), request.get("keep_all", False)
        if not isinstance(keep_all, bool):
            raise ValueError("keep_all must be true or false")
        if self._lost:
            raise ValueError(
                "the worker was replaced and what it had collected is lost: learn.discard, then start again"
            )
        if self._committing:
            raise ValueError("a commit is under way")
        active = self._recipes.of(camera)
        if active.id != self._recipe:
            raise ValueError(f"camera {camera!r} is judged by recipe {active.id!r} now, not {self._recipe!r}")
        self._committing = True
        try:
            made = await self._worker.learn("commit", {"folder": str(self._folder), "keep_all": keep_all})
            active = self._recipes.of(camera)
            others = [name for name in self._recipes.status() if self._recipes.of(name).key == active.key]
            cameras = sorted(others, key=lambda name: name != camera)  # its own first
            recipe, threshold = await self._change(cameras, self._recipe, {"memory": made["memory"]})
        finally:
            self._committing = False
        self._camera = None
        log.info("learnt", recipe=recipe.key, memory=made["memory"], sha256=made["memory_sha256"])
        return {
            **made,
            "cameras": cameras,
            "recipe": {"id": recipe.id, "version": recipe.version},
            "before": {"id": active.id, "version": active.version},
            "threshold": threshold,
        }

    async def _discard(self, _: Header) -> Header:
        self._begun()
        if self._committing:
            raise ValueError("a commit is under way")
        if not self._lost:
            await self._worker.learn("discard", {})
        self._camera = None
        return {"state": "idle"}

    def _begun(self) -> str:
        if self._camera is None:
            raise ValueError("nothing is being learnt: learn.start first")
        return self._camera
