"""The way of a frame: camera -> ring -> queue -> worker -> verdict -> journal -> publish. One verdict for each."""

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import structlog

from flawline.agent.journal import Journal
from flawline.agent.publisher import Publisher
from flawline.agent.verdict import ActiveRecipe, Job, Outcome, Reason, VerdictWriter
from flawline.agent.wire import encode_mask
from flawline.agent.worker_client import WorkerClient
from flawline.camera.camera import Camera, EndOfFrames
from flawline.camera.frame import Frame
from flawline.camera.guard import Guard
from flawline.camera.pixels import to_rgb8
from flawline.camera.ring import FrameRing
from flawline.config.errors import CameraError, ImageError, JournalError, RingError
from flawline.config.settings import Settings
from flawline.models import protocol

log = structlog.get_logger()
T = TypeVar("T")
_IN_FLIGHT = 2  # one that is judged and one that is ready to be


class Pipeline:
    """Owns the jobs. Everything but grabbing and committing happens on the event loop, so nothing is locked."""

    def __init__(
        self,
        settings: Settings,
        ring: FrameRing,
        recipes: dict[str, ActiveRecipe],
        writer: VerdictWriter,
        journal: Journal,
        publisher: Publisher,
        frames_limit: int | None,
    ) -> None:
        self._settings = settings
        self._ring = ring
        self._recipes = recipes
        self._writer = writer
        self.journal = journal
        self._journal_thread = ThreadPoolExecutor(1, "journal")
        self._publisher = publisher
        self._limit = frames_limit
        self._numbers = itertools.count(1)
        self._waiting: deque[Job] = deque()
        self._in_flight: dict[int, Job] = {}
        self._decided: asyncio.Queue[tuple[Job, dict[str, Any]]] = asyncio.Queue()
        self._room = asyncio.Condition()
        self._journal_fails = False
        self._on_their_way: Counter[str] = Counter()
        self.accepted = 0
        self.counts: Counter[str] = Counter()
        self.stopping = asyncio.Event()
        self.done = asyncio.Event()
        self._guards = {camera.name: Guard(camera) for camera in settings.cameras}
        self.worker: WorkerClient

    # -- in: frames -------------------------------------------------------------------------------------------

    async def run_camera(self, camera: Camera, recipe: ActiveRecipe) -> None:
        """Grab until the source ends or the agent stops; a lost camera is opened again with back-off."""
        loop = asyncio.get_running_loop()
        lost = False
        pause = 0.5
        with ThreadPoolExecutor(1, f"camera-{camera.name}") as thread:
            while not self.stopping.is_set():
                try:
                    await loop.run_in_executor(thread, camera.open)
                    if lost:
                        log.info("camera_back", camera=camera.name)
                    lost, pause = False, 0.5
                    await self._grab_all(camera, recipe, thread)
                    break
                except EndOfFrames:
                    log.info("camera_at_end", camera=camera.name)
                    break
                except CameraError as error:
                    if not lost:
                        log.error("camera_lost", camera=camera.name, error=str(error))
                    lost = True
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 10.0)
                finally:
                    await loop.run_in_executor(thread, camera.close)

    async def _grab_all(self, camera: Camera, recipe: ActiveRecipe, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while not self.stopping.is_set():
            if camera.patient:
                await self._wait_for_room(camera.name)
            job = Job(0, camera.name, recipe, 0, 0.0)
            frame, trouble = await loop.run_in_executor(thread, partial(self._grab, camera, job))
            if frame is None:
                continue
            if self._limit is not None and self.accepted >= self._limit:
                self._let_go(job)
                self.stopping.set()
                return
            self._accept(job, frame, trouble)

    async def _wait_for_room(self, camera: str) -> None:
        """Until fewer of a patient camera's frames are on their way than may wait: then it never overruns."""
        depth = self._settings.worker.queue_depth
        async with self._room:
            await self._room.wait_for(lambda: self._on_their_way[camera] < depth or self.stopping.is_set())

    def _grab(self, camera: Camera, job: Job) -> tuple[Frame | None, tuple[Reason, str] | None]:
        """On the camera's thread: the next frame, copied once, from the driver's buffer into its slot."""
        frame = camera.grab(0.25)
        if frame is None:
            return None, None
        if frame.pixels is None:
            reason: Reason = "camera_fault" if frame.fault_reason == "camera_fault" else "bad_frame"
            return frame, (reason, frame.fault or "no picture")
        slot = self._ring.acquire()
        if slot is None:
            return frame, ("overrun", "every slot of the frame ring is in use")
        job.slot, (job.height, job.width) = slot, frame.size
        try:
            picture = self._ring.picture(slot, job.height, job.width)
            to_rgb8(frame.pixels, frame.pixel_format, picture)
            self._guards[camera.name].check(picture, frame.pixel_format)
        except (ImageError, RingError) as error:
            return frame, ("bad_frame", f"{frame.source or camera.name}: {error}")
        return frame, None

    def _queued(self, camera: str) -> int:
        return sum(job.camera == camera for job in self._waiting)

    def _accept(self, job: Job, frame: Frame, trouble: tuple[Reason, str] | None) -> None:
        """From here on the frame is owed a verdict."""
        self.accepted += 1
        self._on_their_way[job.camera] += 1
        job.number = next(self._numbers)
        job.frame_id, job.t_grab, job.t_trigger = frame.frame_id, frame.t_grab, frame.t_grab
        job.mono = job.queued_mono = time.monotonic()
        if trouble is not None:
            self._answer(job, self._writer.error(job, *trouble))
        elif not self.worker.healthy:
            self._answer(job, self._writer.error(job, "worker_lost", "the worker does not stay alive"))
        elif self._queued(job.camera) >= self._settings.worker.queue_depth:
            if job.recipe.recipe.queue == "latest":
                oldest = next(other for other in self._waiting if other.camera == job.camera)
                self._waiting.remove(oldest)
                self._answer(oldest, self._writer.error(oldest, "overrun", "a newer frame took its place"))
                self._waiting.append(job)
            else:
                self._answer(job, self._writer.error(job, "overrun", "worker.queue_depth frames are waiting"))
        else:
            self._waiting.append(job)
        self._feed()

    # -- through: the worker ----------------------------------------------------------------------------------

    def _feed(self) -> None:
        while self._waiting and len(self._in_flight) < _IN_FLIGHT and self.worker.ready:
            job = self._waiting[0]
            assert job.slot is not None
            ask = protocol.inspect(job.number, job.slot, job.height, job.width, job.recipe.key, job.deadline_mono)
            if not self.worker.send(ask):
                return
            self._waiting.popleft()
            job.attempts += 1
            self._in_flight[job.number] = job

    def on_message(self, message: protocol.Message) -> None:
        """What the worker says of a job."""
        job = self._in_flight.get(message.get("job", 0))
        if job is None:
            return
        match message["op"]:
            case "began":
                job.t_start, job.began_mono = message["t_start"], time.monotonic()
                self.worker.busy_since = job.began_mono
                return
            case "result":
                keys = ("score", "threshold", "defects", "stage_ms", "t_done", "degraded", "points")
                outcome = Outcome(**{key: message[key] for key in keys})
                self._answer(job, self._writer.judged(job, outcome))
            case "failed_job":
                self._answer(job, self._writer.error(job, message["reason"], message["error"]))
            case _:
                return
        del self._in_flight[job.number]
        self.worker.busy_since = None
        self._feed()

    def on_worker_lost(self) -> None:
        """The job that was being judged is answered; one that had not begun is tried again, but only once."""
        for job in list(self._in_flight.values()):
            del self._in_flight[job.number]
            if job.began_mono is None and job.attempts < 2:
                self._waiting.appendleft(job)
            else:
                self._answer(job, self._writer.error(job, "worker_lost", "the worker died while judging"))

    def on_worker_unhealthy(self) -> None:
        """No worker is to be had: what waits is answered rather than kept."""
        while self._waiting:
            job = self._waiting.popleft()
            self._answer(job, self._writer.error(job, "worker_lost", "the worker does not stay alive"))

    # -- out: verdicts ----------------------------------------------------------------------------------------

    def _answer(self, job: Job, header: dict[str, Any]) -> None:
        """Decide a job, once. The queue is bounded by the slots and by what cameras may have waiting."""
        assert job.answered is None, "a job is answered once"
        job.answered = header
        self._decided.put_nowait((job, header))

    async def publish_all(self) -> None:
        """Number, commit, publish: in one order, several at a time where several are decided."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._decided.get()]
            while not self._decided.empty() and len(batch) < 64:
                batch.append(self._decided.get_nowait())
            await loop.run_in_executor(self._journal_thread, self._commit, [header for _, header in batch])
            for _, header in batch:
                await self._publisher.verdict(header)
                self.counts[header["result"]] += 1
            for job, header in batch:
                await self._send_mask(job, header)
                self._let_go(job)
                self._on_their_way[job.camera] -= 1
            if self._limit is not None and self.counts.total() >= self._limit:
                self.done.set()
            async with self._room:
                self._room.notify_all()

    def _commit(self, headers: list[dict[str, Any]]) -> None:
        """On the journal's thread. A disk that refuses does not stop the line: the verdict says so."""
        for header in headers:
            header["t_publish"] = time.time_ns()
            self.journal.number(header)
        try:
            self.journal.append([(header, None) for header in headers])
        except JournalError as error:
            if not self._journal_fails:
                log.error("journal_fails", error=str(error))
            self._journal_fails = True
            for header in headers:
                header["journalled"] = False
            self.journal.used_without_journal(headers[-1]["seq"])
        else:
            if self._journal_fails:
                log.info("journal_back")
            self._journal_fails = False

    async def _send_mask(self, job: Job, header: dict[str, Any]) -> None:
        wanted = self._settings.publish.masks
        if job.slot is None or header["result"] == "error" or wanted == "never":
            return
        if header["result"] == "fail" or wanted == "always":
            shape = (job.height, job.width)
            encoding = self._settings.publish.encoding
            mask = self._ring.mask(job.slot, *shape)
            payload = await asyncio.get_running_loop().run_in_executor(None, encode_mask, mask, encoding)
            await self._publisher.mask(header, shape, encoding, payload)

    def _let_go(self, job: Job) -> None:
        if job.slot is not None:
            self._ring.release(job.slot)
            job.slot = None

    async def stop_intake(self) -> None:
        """No camera grabs another frame."""
        self.stopping.set()
        async with self._room:
            self._room.notify_all()

    async def drain(self, limit_s: float) -> None:
        """At a stop: judge what was accepted, for so long; answer the rest; publish it all."""
        deadline = time.monotonic() + limit_s
        while (self._waiting or self._in_flight) and time.monotonic() < deadline and self.worker.healthy:
            self._feed()
            await asyncio.sleep(0.01)
        for job in [*self._in_flight.values(), *self._waiting]:
            self._answer(job, self._writer.error(job, "agent_restart", "the agent stopped before it was judged"))
        self._in_flight.clear()
        self._waiting.clear()
        async with self._room:
            await self._room.wait_for(lambda: self.counts.total() >= self.accepted)

    async def on_journal(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run one of the journal's methods on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._journal_thread, work, *arguments)

    def close(self) -> None:
        """End the journal's thread."""
        self._journal_thread.shutdown()

    def status(self) -> dict[str, Any]:
        """Counters and queues for the status message."""
        return {
            "triggers": self.accepted,
            **{result: self.counts[result] for result in ("pass", "fail", "error")},
            "waiting": len(self._waiting),
            "journal": {"ok": not self._journal_fails, "set_aside": str(self.journal.set_aside or "") or None},
        }
