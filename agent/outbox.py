"""The way out: number, journal, publish, in one order; then masks, archive and whoever looks on.

Three stages, each a task, so that none holds up the one before it: commit (many at a time, on the journal's
thread), publish (never waits for a subscriber), and what follows a verdict and needs its picture.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import structlog

from flawline.agent.archive import Archive
from flawline.agent.journal import Journal
from flawline.agent.publisher import Publisher
from flawline.agent.verdict import Job, Trigger
from flawline.agent.wire import Header, encode_mask
from flawline.camera.ring import FrameRing
from flawline.config.errors import JournalError
from flawline.config.settings import PublishSettings

log = structlog.get_logger()
T = TypeVar("T")
_BATCH = 128  # items of one commit
BACKLOG = 1000
"""Decided but not yet published: cameras wait while there are more (a disk that hangs)."""


@dataclass(slots=True, eq=False)
class _Item:
    kind: Literal["accept", "verdict", "late", "refined"]
    job: Job | None = None
    header: Header = field(default_factory=dict)
    not_before: float | None = None  # monotonic: a deadline's verdict is committed before it and leaves at it
    trigger: Trigger | None = None
    accepted: asyncio.Future[bool] | None = None
    refined: bool = False  # the mask lies in the slot's second plane


class Outbox:
    """Everything is called on the event loop."""

    def __init__(
        self, settings: PublishSettings, ring: FrameRing, journal: Journal, publisher: Publisher, archive: Archive
    ) -> None:
        self._settings = settings
        self._ring = ring
        self.journal = journal
        self._publisher = publisher
        self.archive = archive
        self._journal_thread = ThreadPoolExecutor(1, "journal")
        self._archive_thread = ThreadPoolExecutor(1, "archive")
        # Bounded by the ring's slots, by control's requests in work, and by BACKLOG for what cameras deliver.
        self._decided: asyncio.Queue[_Item] = asyncio.Queue()
        self._committed: asyncio.Queue[list[_Item]] = asyncio.Queue()
        self._following: asyncio.Queue[_Item] = asyncio.Queue()
        self._open = 0  # items on their way
        self._moved_mono = 0.0  # when the last one went out with all that follows it
        self._commit_s: deque[float] = deque([0.0005], maxlen=64)
        self.journal_fails = False
        self.accepted = 0
        self.results: Counter[str] = Counter()  # pass, fail, error
        self.reasons: Counter[tuple[str, str | None]] = Counter()  # (result, reason)
        self.late_results = 0
        self.worst_overshoot_ms = 0.0
        self.last_seq = journal.last_seq
        self.camera_seqs = dict(journal.camera_seqs)
        self.on_done: Callable[[Job], None] = lambda _: None  # its verdict is out, and the mask
        self.observers: list[Callable[[Job, Header], None]] = []
        """Called with a job and its verdict, late or refined header while the slot still holds picture, mask and
        map. They must not block; one that needs the slot longer takes a hold on the job and lets go of it."""

    def masks_are(self, settings: PublishSettings) -> None:
        """Which masks go out from now on, and how."""
        self._settings = settings

    # -- in ---------------------------------------------------------------------------------------------------

    def accept(self, trigger: Trigger) -> asyncio.Future[bool]:
        """Journal a trigger; the future says whether it is (false: the disk refuses)."""
        item = _Item("accept", trigger=trigger, accepted=asyncio.get_running_loop().create_future())
        assert item.accepted is not None
        self._put(item)
        return item.accepted

    def verdict(self, job: Job, header: Header, not_before: float | None = None) -> None:
        """The job's one verdict."""
        self._put(_Item("verdict", job, header, not_before))

    def late(self, job: Job, header: Header, *, refined: bool = False) -> None:
        """The result that came after the job's `error: deadline`."""
        self._put(_Item("late", job, header, refined=refined))

    def refined(self, job: Job, header: Header) -> None:
        """SAM has run after the job's degraded verdict."""
        self._put(_Item("refined", job, header, refined=True))

    def _put(self, item: _Item) -> None:
        if item.job is not None:
            item.job.holds += 1
        if not self._open:
            self._moved_mono = time.monotonic()
        self._open += 1
        self._decided.put_nowait(item)

    @property
    def backlog(self) -> int:
        """Items that are not out yet, with all that follows them."""
        return self._open

    @property
    def stuck_s(self) -> float:
        """So long nothing has gone out although something should, whichever stage it hangs in."""
        return time.monotonic() - self._moved_mono if self._open else 0.0

    @property
    def lead_s(self) -> float:
        """So long before a deadline its commit must begin: one that has begun, and its own."""
        return min(0.001 + 2 * max(self._commit_s), 0.02)

    # -- commit -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._commit_all())
            group.create_task(self._publish_all())
            group.create_task(self._follow_all())

    async def _commit_all(self) -> None:
        while True:
            batch = [await self._decided.get()]
            while not self._decided.empty() and len(batch) < _BATCH:
                batch.append(self._decided.get_nowait())
            began = time.monotonic()
            await self.on_journal(self._commit, batch)
            self._commit_s.append(time.monotonic() - began)
            for item in batch:
                if item.accepted is not None and not item.accepted.cancelled():
                    item.accepted.set_result(item.trigger is not None and item.trigger.row is not None)
            self._committed.put_nowait(batch)

    def _commit(self, batch: list[_Item]) -> None:
        """On the journal's thread. A disk that refuses does not stop the line: the verdict says so."""
        now, mono = time.time_ns(), time.monotonic()
        for item in batch:
            wait = max(0.0, (item.not_before or mono) - mono)
            item.header["t_publish"] = now + int(wait * 1e9)
            item.header["mono_publish"] = int((mono + wait) * 1e9)
            if item.kind == "verdict":
                self.journal.number(item.header)
            elif item.job is not None and item.job.verdict is not None:
                for key in ("seq", "camera_seq", "journalled"):
                    item.header[key] = item.job.verdict[key]
        try:
            self.journal.commit(
                [(item.header, item.job.trigger) for item in batch if item.kind == "verdict" and item.job is not None],
                [item.trigger for item in batch if item.trigger is not None],
                [item.header for item in batch if item.kind == "late"],
            )
        except JournalError as error:
            if not self.journal_fails:
                log.error("journal_fails", error=str(error))
            self.journal_fails = True
        else:
            if self.journal_fails:
                log.info("journal_back")
            self.journal_fails = False

    async def try_journal(self) -> None:
        """See whether the disk takes something again, and write what was kept meanwhile."""
        left = -1
        while left != self.journal.unwritten:
            left = self.journal.unwritten
            await self.on_journal(self._commit, [])

    # -- publish ----------------------------------------------------------------------------------------------

    async def _publish_all(self) -> None:
        while True:
            for item in await self._committed.get():
                if item.not_before is not None and (wait := item.not_before - time.monotonic()) > 0:
                    # Whatever is decided later has a later deadline: nothing behind it is made late by this.
                    await asyncio.sleep(wait)
                if item.job is None:
                    self._open -= 1
                    continue
                # The journal has the times that were planned; what goes out says when it really does.
                item.header["t_publish"], item.header["mono_publish"] = time.time_ns(), time.monotonic_ns()
                if item.kind == "verdict":
                    self._publish(item.job, item.header)
                elif item.kind == "late":
                    self._publisher.late(item.header)
                    self.late_results += 1
                self._following.put_nowait(item)

    def _publish(self, job: Job, header: Header) -> None:
        self._publisher.verdict(header)
        self.last_seq = header["seq"]
        self.camera_seqs[header["camera"]] = header["camera_seq"]
        self.results[header["result"]] += 1
        self.reasons[header["result"], header["reason"]] += 1
        if job.deadline_mono is not None and header["reason"] != "agent_restart":
            overshoot_ms = (time.monotonic() - job.deadline_mono) * 1000
            self.worst_overshoot_ms = max(self.worst_overshoot_ms, overshoot_ms)

    # -- what follows -----------------------------------------------------------------------------------------

    async def _follow_all(self) -> None:
        while True:
            item = await self._following.get()
            job = item.job
            assert job is not None
            if job.slot is not None:
                await self._send_mask(job, item)
                if item.kind != "refined" and self.archive.wants(item.header):
                    self._keep_picture(job, item.header)
            for observer in self.observers:
                observer(job, item.header)
            job.let_go(self._ring)
            self._open -= 1
            self._moved_mono = time.monotonic()
            if item.kind == "verdict":
                self.on_done(job)

    async def _send_mask(self, job: Job, item: _Item) -> None:
        wanted, encoding = self._settings.masks, self._settings.encoding
        if item.header["result"] == "error" or wanted == "never":
            return
        if item.header["result"] == "fail" or wanted == "always" or item.kind == "refined":
            shape = (job.height, job.width)
            assert job.slot is not None
            mask = self._ring.mask(job.slot, *shape, refined=item.refined)
            payload = await asyncio.get_running_loop().run_in_executor(None, encode_mask, mask, encoding)
            self._publisher.mask(item.header, shape, encoding, payload, refined=item.kind == "refined")

    def _keep_picture(self, job: Job, header: Header) -> None:
        assert job.slot is not None
        picture = self._ring.picture(job.slot, job.height, job.width)
        job.holds += 1
        loop = asyncio.get_running_loop()
        kept = loop.run_in_executor(self._archive_thread, self.archive.keep, header, picture)

        def done(_: asyncio.Future[None]) -> None:
            self.archive.waiting -= 1
            job.let_go(self._ring)

        kept.add_done_callback(done)

    # -- the journal ------------------------------------------------------------------------------------------

    async def on_journal(self, work: Callable[..., T], *arguments: Any, **more: Any) -> T:
        """Run one of the journal's methods on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._journal_thread, partial(work, *arguments, **more))

    async def on_archive(self, work: Callable[[], T]) -> T:
        """Run something that waits for the disk on the archive's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._archive_thread, work)

    async def until_empty(self, limit_s: float) -> None:
        """Wait until all that was decided is out, for so long."""
        for _ in range(int(limit_s / 0.005)):
            if not self._open and not self.archive.waiting:
                return
            await asyncio.sleep(0.005)

    def close(self) -> None:
        """End the threads."""
        self._journal_thread.shutdown()
        self._archive_thread.shutdown()

    def status(self) -> Header:
        """Counters for the status message. `triggers` = pass + fail + error + those that are still owed."""
        results = {result: self.results[result] for result in ("pass", "fail", "error")}
        verdicts = self.results.total()
        counters = {"triggers": self.accepted, "verdicts": verdicts, **results}
        return {
            **counters,
            "counters": {**counters, "owed": self.accepted - verdicts, "late": self.late_results},
            "deadlines": {
                "missed": self.reasons["error", "deadline"],
                "worst_overshoot_ms": round(self.worst_overshoot_ms, 3),
                "lead_ms": round(self.lead_s * 1000, 3),
            },
            "journal": {
                "ok": not self.journal_fails,
                "unwritten": self.journal.unwritten,
                "set_aside": str(self.journal.set_aside or "") or None,
                "archive": self.archive.status(),
            },
        }
