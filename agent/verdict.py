"""A job from trigger to verdict, and the verdict's header."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from flawline.agent.wire import VERDICT_SCHEMA, Header
from flawline.camera.ring import FrameRing
from flawline.config.recipe import Recipe
from flawline.models.results import STAGES

TIMED = ("queue", *STAGES, "total")
"""Keys of a verdict's `stage_ms`."""
Reason = Literal[
    "deadline",
    "overrun",
    "worker_lost",
    "out_of_memory",
    "camera_fault",
    "bad_frame",
    "agent_restart",
    "paused",
    "internal",
]


@dataclass(frozen=True, slots=True)
class ActiveRecipe:
    """A recipe as it judges: one version of it, known to the worker under `key`."""

    id: str
    version: int
    recipe: Recipe
    sha256: str | None
    threshold: float | None = None  # from the recipe, or the bundle's once the worker has said it
    memory_sha256: str | None = None  # of the memory of good parts, where it has one

    @property
    def key(self) -> str:
        """The name the worker knows it by."""
        return f"{self.id}@{self.version}"


@dataclass(slots=True, eq=False)
class Trigger:
    """A trigger that was accepted and is owed a verdict."""

    camera: str
    trigger_id: str | None
    part_id: str | None
    t_trigger: int  # UTC, ns
    recipe: str
    recipe_version: int
    row: int | None = None  # in the journal, set by its thread; None where the journal could not be written


@dataclass(slots=True, eq=False)
class Job:
    """One trigger or one free-running frame on its way to its one verdict."""

    camera: str
    recipe: ActiveRecipe
    t_trigger: int  # UTC, ns; for a free-running frame the time it was grabbed
    mono: float  # the same moment on the monotonic clock, s
    number: int = 0
    trigger: Trigger | None = None
    sent_mono: int | None = None  # monotonic, ns: the camera has taken the software trigger
    frame_id: int | None = None
    t_grab: int | None = None
    t_start: int | None = None
    slot: int | None = None
    height: int = 0
    width: int = 0
    attempts: int = 0
    began_mono: float | None = None
    queued_mono: float | None = None
    verdict: Header | None = None  # once it is decided; its seq comes when it is journalled
    held: "Outcome | None" = None  # the CLIP-only outcome that came after the deadline, until SAM has run
    points: list[list[float]] = field(default_factory=list)  # of its inspection: x, y, label
    timer: asyncio.TimerHandle | None = None  # the deadline's
    holds: int = 0  # how many still use the slot: the pipeline, and each message that follows

    @property
    def deadline_mono(self) -> float | None:
        """When the verdict must be out, on the monotonic clock."""
        limit = self.recipe.recipe.deadline_ms
        return None if limit is None else self.mono + limit / 1000

    @property
    def is_late(self) -> bool:
        """Its verdict was `deadline`; the real result is still to follow."""
        return self.verdict is not None and self.verdict["reason"] == "deadline"

    def let_go(self, ring: FrameRing) -> None:
        """One user of the slot less; the last one gives it back."""
        self.holds -= 1
        if self.holds == 0 and self.slot is not None:
            ring.release(self.slot)
            self.slot = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the worker found."""

    score: float
    threshold: float
    defects: list[dict[str, Any]]
    stage_ms: dict[str, float]
    t_done: int
    degraded: bool = False
    points: list[list[float]] = field(default_factory=list)
    warning: str | None = None  # docs/verdicts.md has the list


class VerdictWriter:
    """Makes headers; knows who we are and which models judge."""

    def __init__(self, station: str, boot_id: str, agent_version: str) -> None:
        self.station = station
        self.boot_id = boot_id
        self._provenance: dict[str, Any] = {"agent": agent_version}
        self.models_are(None, None, None)

    def models_are(self, bundle: str | None, bundle_sha256: str | None, precision: str | None) -> None:
        """From now on verdicts name this bundle, and the precision of its encoders."""
        self._provenance |= {"bundle": bundle, "bundle_sha256": bundle_sha256, "precision": precision}

    def judged(self, job: Job, outcome: Outcome) -> Header:
        """`pass` or `fail`: an inspection that completed."""
        queue_ms = 0.0
        if job.queued_mono is not None and job.began_mono is not None:
            queue_ms = max(0.0, (job.began_mono - job.queued_mono) * 1000)
        return self._header(
            job,
            result="fail" if outcome.defects else "pass",
            reason="clip_only" if outcome.degraded else None,
            degraded=outcome.degraded,
            score=outcome.score,
            threshold=outcome.threshold,
            defects=outcome.defects,
            t_done=outcome.t_done,
            stage_ms=dict.fromkeys(TIMED, 0.0) | {"queue": queue_ms} | outcome.stage_ms,
            warning=outcome.warning,
        )

    def error(self, job: Job, reason: Reason, detail: str | None = None) -> Header:
        """`error`: the part was not judged; `detail` says why in words."""
        header = self._header(
            job,
            result="error",
            reason=reason,
            degraded=False,
            score=None,
            threshold=job.recipe.threshold,
            defects=[],
            t_done=None,
            stage_ms={},
            warning=None,
        )
        if detail is not None:
            header["detail"] = detail.encode("utf-8", "backslashreplace").decode()  # a file's name may be any bytes
        return header

    def _header(self, job: Job, **judgement: Any) -> Header:
        trigger = job.trigger
        return {
            "schema": VERDICT_SCHEMA,
            "station": self.station,
            "camera": job.camera,
            "seq": 0,
            "camera_seq": 0,
            "boot_id": self.boot_id,
            "frame_id": job.frame_id,
            "trigger_id": trigger.trigger_id if trigger else None,
            "part_id": trigger.part_id if trigger else None,
            "recipe": {"id": job.recipe.id, "version": job.recipe.version},
            "journalled": True,
            **judgement,
            "t_trigger": job.t_trigger,
            "t_grab": job.t_grab,
            "t_start": job.t_start,
            "t_publish": time.time_ns(),
            "mono_trigger": int(job.mono * 1e9),
            "mono_publish": time.monotonic_ns(),
            "deadline_ms": job.recipe.recipe.deadline_ms,
            "provenance": {
                **self._provenance,
                "recipe_sha256": job.recipe.sha256,
                "memory_sha256": job.recipe.memory_sha256,
            },
        }
