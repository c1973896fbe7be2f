"""The way of a frame from its queue through the worker to its verdict: deadlines, overruns, lost workers."""

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable

import structlog

from flawline.agent.outbox import Outbox
from flawline.agent.verdict import Job, Outcome, Reason, VerdictWriter
from flawline.agent.wire import Header
from flawline.agent.worker_client import WorkerClient
from flawline.camera.ring import FrameRing
from flawline.models import protocol

log = structlog.get_logger()
_IN_FLIGHT = 2  # one that is judged and one that is ready to be
_NO_WORKER = "the worker does not stay alive"


class Pipeline:
    """Owns the jobs. Everything happens on the event loop, so nothing is locked.

    A job is answered once: by its result, by an error, or by `deadline`, after which its result goes out late.
    """

    def __init__(self, ring: FrameRing, writer: VerdictWriter, outbox: Outbox, queue_depth: int) -> None:
        self._ring = ring
        self._writer = writer
        self._outbox = outbox
        self._depth = queue_depth
        self._numbers = itertools.count(1)
        self._waiting: deque[Job] = deque()
        self._late: deque[Job] = deque()  # their deadline has passed: judged when nothing else waits
        self._in_flight: dict[int, Job] = {}
        self._served = itertools.count(1)
        self._turns: dict[str, int] = {}  # when each camera was served last
        self.dropped: Counter[tuple[str, str]] = Counter()  # (stage, reason): frames that were not judged
        self.worker: WorkerClient
        self.learn_from: Callable[[Job], str | None] = lambda _job: None  # its name in a memory that is being learnt

    # -- in ---------------------------------------------------------------------------------------------------

    def accept(self, job: Job) -> None:
        """From here on the job is owed a verdict, at its deadline at the latest."""
        self._outbox.accepted += 1
        job.number = next(self._numbers)
        if job.deadline_mono is not None:
            when = job.deadline_mono - min(self._outbox.lead_s, (job.deadline_mono - job.mono) / 4)
            job.timer = asyncio.get_running_loop().call_at(when, self._deadline, job)

    def queued(self, camera: str) -> int:
        """How many of a camera's frames wait for the worker."""
        return sum(job.camera == camera for job in self._waiting)

    def submit(self, job: Job) -> None:
        """Its frame is in its slot: to the worker, in its turn. The slot is held until the job is done."""
        job.queued_mono = time.monotonic()
        if job.verdict is not None:
            self._wait_late(job)
        elif not self.worker.healthy:
            self.fail(job, "worker_lost", _NO_WORKER)
        elif self.queued(job.camera) < self._depth:
            self._waiting.append(job)
        elif job.recipe.recipe.queue == "latest":
            oldest = next(other for other in self._waiting if other.camera == job.camera)
            self._waiting.remove(oldest)
            self.dropped["queue", "latest"] += 1
            self.fail(oldest, "overrun", "a newer frame took its place")
            self._waiting.append(job)
        else:
            self.dropped["queue", "full"] += 1
            self.fail(job, "overrun", "worker.queue_depth frames are waiting")
        self.feed()

    def fail(self, job: Job, reason: Reason, detail: str) -> None:
        """The job will not be judged."""
        self._finish(job, self._writer.error(job, reason, detail))

    def _finish(self, job: Job, header: Header) -> None:
        """The job's result, whatever it is; nothing but a refined mask may follow."""
        if job.verdict is None:
            self._decide(job, header)
        elif job.is_late:
            self._outbox.late(job, header)
        if job.slot is not None:
            job.let_go(self._ring)

    def _decide(self, job: Job, header: Header, not_before: float | None = None) -> None:
        assert job.verdict is None, "a job is answered once"
        job.verdict = header
        if job.timer is not None:
            job.timer.cancel()
        self._outbox.verdict(job, header, not_before)

    # -- deadlines --------------------------------------------------------------------------------------------

    def _deadline(self, job: Job) -> None:
        """A little before the deadline, so that the commit is done at it."""
        if job.verdict is not None:
            return
        limit = job.recipe.recipe.deadline_ms
        stage = "camera" if job.frame_id is None else "queue" if job.began_mono is None else "inspection"
        header = self._writer.error(job, "deadline", f"{stage} was not done within deadline_ms = {limit}")
        self._decide(job, header, job.deadline_mono)
        if job in self._waiting:
            self._waiting.remove(job)
            self._wait_late(job)

    def _wait_late(self, job: Job) -> None:
        while len(self._late) >= self._depth:
            self.dropped["late", "full"] += 1
            self.fail(self._late.popleft(), "overrun", "too many frames are late")
        self._late.append(job)
        self.feed()

    # -- the worker -------------------------------------------------------------------------------------------

    def feed(self) -> None:
        """Hand over what waits, as far as the worker takes it."""
        while len(self._in_flight) < _IN_FLIGHT and self.worker.ready:
            job = self._next()
            if job is None:
                return
            assert job.slot is not None
            by = job.deadline_mono
            if by is not None:
                by = None if job.is_late else by - self._outbox.lead_s
            place = (job.slot, job.height, job.width)
            if not self.worker.send(protocol.inspect(job.number, *place, job.recipe.key, by, self.learn_from(job))):
                return
            (self._waiting if job in self._waiting else self._late).remove(job)
            self._turns[job.camera] = next(self._served)
            job.attempts += 1
            self._in_flight[job.number] = job
            if self.worker.busy_since is None:  # it may hang before it begins: in a recipe, in learning
                self.worker.busy_since = time.monotonic()

    def _next(self) -> Job | None:
        """The first frame of the camera that has waited longest for its turn: no camera, however fast, starves another.

        A late one goes alone, so that at most one stands before a timely one.
        """
        if not self._waiting:
            return self._late[0] if self._late and not self._in_flight else None
        first: dict[str, Job] = {}
        for job in self._waiting:
            first.setdefault(job.camera, job)
        return min(first.values(), key=lambda job: self._turns.get(job.camera, 0))

    def on_message(self, message: protocol.Message) -> None:
        """What the worker says of a job. Raises KeyError, TypeError where it is not what was agreed."""
        job = self._in_flight.get(message.get("job", 0))
        if job is None:
            return
        job.points = message.get("points", job.points)
        match message["op"]:
            case "began":
                job.t_start, job.began_mono = message["t_start"], time.monotonic()
                self.worker.busy_since = job.began_mono
                return
            case "result" if message["refining"]:
                self._on_degraded(job, _outcome(message))
                return  # SAM still runs
            case "result":
                self._finish(job, self._writer.judged(job, _outcome(message)))
            case "refined":
                self._on_refined(job, _outcome(message))
            case "unrefined":
                self.dropped["refinement", "busy"] += 1
                self._abandon_refinement(job)
            case "failed_job" if message["refining"]:
                log.error("refinement_failed", camera=job.camera, frame_id=job.frame_id, error=message["error"])
                self._abandon_refinement(job)
            case "failed_job":
                self.fail(job, message["reason"], message["error"])
            case _:
                return
        del self._in_flight[job.number]
        self.worker.busy_since = time.monotonic() if self._in_flight else None
        self.feed()

    def _on_degraded(self, job: Job, outcome: Outcome) -> None:
        if job.verdict is None:
            self._decide(job, self._writer.judged(job, outcome))
        else:
            job.held = outcome

    def _on_refined(self, job: Job, outcome: Outcome) -> None:
        header = self._writer.judged(job, outcome)
        if job.is_late:
            self._outbox.late(job, header, refined=True)
        else:
            self._outbox.refined(job, header)
        job.let_go(self._ring)

    def _abandon_refinement(self, job: Job) -> None:
        """The CLIP map's verdict is out, or it is the best that there is for a late result."""
        if job.is_late and job.held is not None:
            self._outbox.late(job, self._writer.judged(job, job.held))
        job.let_go(self._ring)

    def on_worker_lost(self) -> None:
        """The job that was being judged is answered and never tried again: it may be what killed the worker.

        One that had not begun is tried again, but only once.
        """
        for job in reversed(list(self._in_flight.values())):  # put back at the front, so the last one first
            del self._in_flight[job.number]
            refining = job.held is not None or (job.verdict is not None and not job.is_late)
            if refining:
                self._abandon_refinement(job)
            elif job.began_mono is None and job.attempts < 2:
                (self._late if job.is_late else self._waiting).appendleft(job)
            else:
                self.fail(job, "worker_lost", "the worker died while judging")

    def on_worker_unhealthy(self) -> None:
        """No worker is to be had: what waits is answered rather than kept."""
        for queue in (self._waiting, self._late):
            while queue:
                self.fail(queue.popleft(), "worker_lost", _NO_WORKER)

    # -- the end ----------------------------------------------------------------------------------------------

    async def drain(self, limit_s: float) -> None:
        """At a stop: judge what was accepted, for so long; answer the rest."""
        end = time.monotonic() + limit_s
        while (self._waiting or self._late or self._in_flight) and time.monotonic() < end and self.worker.healthy:
            self.feed()
            await asyncio.sleep(0.01)
        left = [*self._in_flight.values(), *self._waiting, *self._late]
        self._in_flight.clear()
        self._waiting.clear()
        self._late.clear()
        for job in left:
            if job.held is not None or (job.verdict is not None and not job.is_late):
                self._abandon_refinement(job)
            else:
                self.fail(job, "agent_restart", "the agent stopped before it was judged")

    def status(self) -> Header:
        """How much is under way."""
        return {
            "waiting": len(self._waiting),
            "late_waiting": len(self._late),
            "in_flight": len(self._in_flight),
            "dropped": {f"{stage}:{reason}": count for (stage, reason), count in self.dropped.items()},
        }


def _outcome(message: protocol.Message) -> Outcome:
    keys = ("score", "threshold", "defects", "stage_ms", "t_done", "degraded", "points", "warning")
    return Outcome(**{key: message[key] for key in keys})
