"""The agent: what belongs together, started in order, stopped in the other order."""

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import structlog
import zmq
import zmq.asyncio

from flawline import __version__
from flawline.agent.addresses import until_there
from flawline.agent.allocator import keep_memory_flat
from flawline.agent.archive import Archive
from flawline.agent.commands import Commands
from flawline.agent.control import Control
from flawline.agent.housekeeping import keep_house
from flawline.agent.intake import Intake
from flawline.agent.journal import Journal
from flawline.agent.learning import Learning
from flawline.agent.liveness import what_stands_still
from flawline.agent.metrics import Metrics
from flawline.agent.notify import ServiceManager, ServiceReporter
from flawline.agent.observer import Onlookers
from flawline.agent.outbox import Outbox
from flawline.agent.pipeline import Pipeline
from flawline.agent.preview import Preview
from flawline.agent.publisher import Publisher
from flawline.agent.recipes import RecipeBook
from flawline.agent.reload import Reloader
from flawline.agent.security import Curve, Doorkeeper
from flawline.agent.station_folder import PICTURES, station_folder
from flawline.agent.verdict import VerdictWriter
from flawline.agent.wire import STATUS_SCHEMA, Header
from flawline.agent.worker_client import WorkerClient
from flawline.camera.registry import make_camera
from flawline.camera.ring import FrameRing
from flawline.config.errors import FlawlineError
from flawline.config.memory_versions import FOLDER
from flawline.config.settings import Settings

log = structlog.get_logger()
_HELPERS = 4  # threads: masks are encoded, the journal's log is carried over, a changed file is read
_OPEN_LIMIT_S = 5.0  # so long the first triggers wait for cameras to open


class Agent:
    """The parts of a running agent. Making it binds the sockets and opens the journal, but starts nothing."""

    def __init__(
        self,
        settings: Settings,
        frames_limit: int | None,
        read_again: Callable[[], Settings],
        manager: ServiceManager,
        stack: contextlib.ExitStack,
        folder: Path | None,
    ) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self.state = "starting"
        cameras = [(make_camera(camera), camera) for camera in settings.cameras]
        for camera, _ in cameras:
            camera.most_pixels = int(settings.worker.max_frame_mpx * 1e6)
        context = stack.enter_context(_context())
        doors = {
            section: curve.clients
            for section, curve in (
                ("publish", Curve.of("publish", settings.publish)),
                ("control", Curve.of("control", settings.control, settings.publish)),
            )
            if curve is not None
        }
        # ZeroMQ asks it from the first connection on, so it must be there before the sockets are.
        self.doorkeeper = Doorkeeper(context, doors)
        stack.callback(self.doorkeeper.close)
        self.journal = Journal(station_folder(settings), settings.journal.durability)
        stack.callback(self.journal.close)
        publisher = Publisher(zmq.Context.shadow(context), settings.publish, settings.station)
        stack.callback(publisher.close)
        self.publisher = publisher
        self.control = Control(context, settings.control, settings.publish)
        stack.callback(self.control.close)
        depth = settings.worker.queue_depth
        # Per camera: those that wait, those that are late, and those whose masks and pictures are on their way.
        self.ring = FrameRing(len(cameras) * (2 * depth + 6) + 2, int(settings.worker.max_frame_mpx * 1e6))
        stack.callback(self.ring.close)
        archive = Archive(self.journal.folder / PICTURES, settings.journal)
        self.outbox = Outbox(settings.publish, self.ring, self.journal, publisher, archive)
        stack.callback(self.outbox.close)
        self.recipes = RecipeBook(settings, self.journal)
        self.writer = VerdictWriter(settings.station, self.boot_id, __version__)
        self.pipeline = Pipeline(self.ring, self.writer, self.outbox, depth)
        self.intake = Intake(cameras, self.ring, self.recipes, self.pipeline, self.outbox, depth, frames_limit)
        stack.callback(self.intake.close)
        self.worker = WorkerClient(
            self.ring,
            settings.model,
            settings.worker,
            self.recipes.for_worker,
            on_message=self.pipeline.on_message,
            on_ready=self._on_models,
            on_lost=self.pipeline.on_worker_lost,
            on_unhealthy=self.pipeline.on_worker_unhealthy,
            maps=settings.preview.enabled,  # no one else looks at them
        )
        self.pipeline.worker = self.worker
        memories = [settings.journal.path / FOLDER, *([] if folder is None else [folder / FOLDER])]
        self.commands = Commands(
            self.intake, self.recipes, self.outbox, self.journal, self.worker, self.status, memories
        )
        stack.callback(self.commands.close)
        learning = Learning(self.recipes, self.worker, self.commands.change, settings.journal.path / FOLDER)
        self.commands.add(learning.table)
        self.pipeline.learn_from = learning.wants
        self.reloader = Reloader(
            settings, read_again, self.recipes, self.worker, self.outbox, switching=self.commands.switching
        )
        self.service = ServiceReporter(
            manager, self.status, lambda: what_stands_still(self.intake, self.worker, self.outbox)
        )
        self.preview: Preview | None = None
        if settings.preview.enabled:
            metrics = Metrics(self.status, self.outbox.reasons, self.pipeline.dropped)
            names = [camera.name for camera in settings.cameras]
            self.preview = Preview(settings.preview, settings.station, names, self.status, metrics)
            self.outbox.observers.append(Onlookers(self.ring, [metrics, self.preview]))

    def _on_models(self, about: Header) -> None:
        models = about["bundle"], about["bundle_sha256"], about.get("precision")
        self.writer.models_are(*models)
        self.recipes.thresholds_are(about.get("thresholds", {}))
        self.recipes.judged_by(*models)
        self.pipeline.feed()

    async def run(self) -> None:
        """Until a signal, or until as many verdicts are out as were asked for. Raises FlawlineError."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(_helpers())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        changed = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, changed.set)
        journal = self.journal
        log.info("starting", boot_id=self.boot_id, pid=os.getpid(), last_seq=journal.last_seq)
        if journal.seq_jump:
            log.warning("numbers_jump", seq_jump=journal.seq_jump, set_aside=str(journal.set_aside))
        self.intake.recover(journal.unanswered())
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.outbox.run()),
                    group.create_task(self._say_status()),
                    group.create_task(self.doorkeeper.serve()),
                    group.create_task(self.control.serve(self.commands)),
                    group.create_task(keep_house(self.outbox, self.settings.journal)),
                    group.create_task(self.service.run()),
                    group.create_task(self._reload_on(changed)),
                ]
                if self.preview is not None:
                    await self.preview.start()
                    tasks.append(group.create_task(self.preview.run()))
                stopped = group.create_task(stop.wait())
                if await self._start_worker(stopped):
                    tasks.append(group.create_task(self.worker.run()))
                    await self._inspect(group, stopped)
                else:
                    self._say_stopping()
                for task in (*tasks, stopped):
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise _first_of_ours(failures) from failures
        finally:
            if self.preview is not None:
                await self.preview.close()
            await self.worker.stop()
        log.info("stopped", triggers=self.outbox.accepted, **self.outbox.results)

    async def _start_worker(self, stopped: asyncio.Task[bool]) -> bool:
        """False where a signal came first."""
        start = asyncio.ensure_future(self.worker.start())
        await asyncio.wait([start, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.wait([start])
            return False
        start.result()
        return True

    async def _inspect(self, group: asyncio.TaskGroup, stopped: asyncio.Task[bool]) -> None:
        """From the first frame to the last verdict."""
        intake = self.intake
        # What is loaded by now stays: the collector need not look at it again while a verdict waits.
        gc.collect()
        gc.freeze()
        grabbing = [group.create_task(intake.run_camera(line)) for line in intake.lines.values()]
        await intake.until_open(_OPEN_LIMIT_S)
        self.state = "running"
        waits = [group.create_task(intake.done.wait()), stopped]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._say_stopping()
        waits[0].cancel()
        intake.stop()
        await asyncio.wait(grabbing, timeout=5)
        for grab in grabbing:
            grab.cancel()
        await asyncio.wait(grabbing)
        await self.pipeline.drain(self.settings.worker.drain_s)
        await self.outbox.until_empty(30.0)
        self.publisher.status(self.status())  # the last number of all

    def _say_stopping(self) -> None:
        self.state = "stopping"
        self.publisher.status(self.status())  # a stop may take less than until the next second's
        self.service.stopping()
        log.info("stopping")

    async def _reload_on(self, changed: asyncio.Event) -> None:
        """SIGHUP: the configuration has changed."""
        while True:
            await changed.wait()
            changed.clear()
            self.service.reloading()
            self.service.reloaded(await self.reloader.reload())

    async def _say_status(self) -> None:
        """Once a second, so that silence means a fault."""
        while True:
            self.publisher.status(self.status())
            await asyncio.sleep(1.0)

    def status(self) -> Header:
        """What the station is doing, for subscribers and for the `status` command."""
        state = self.state
        still = list(what_stands_still(self.intake, self.worker, self.outbox))
        if state == "running":
            well = self.worker.ready and not self.outbox.journal_fails and not still
            well = well and all(line.up or line.state == "ended" for line in self.intake.lines.values())
            state = "paused" if self.intake.paused else "running" if well else "degraded"
        jump = self.journal.seq_jump
        return {
            "schema": STATUS_SCHEMA,
            "station": self.settings.station,
            "boot_id": self.boot_id,
            "agent": __version__,
            "t": time.time_ns(),
            "last_seq": self.outbox.last_seq,
            "seq_jump": list(jump) if jump else None,
            "state": state,
            "paused": self.intake.paused,
            "no_progress": still,
            "control": self.settings.control.endpoint,
            "cameras": self.intake.status(),
            "worker": self.worker.status(),
            "recipe": self.recipes.status(),
            **self.outbox.status(),
            **self.pipeline.status(),
        }


async def run_agent(
    settings: Settings,
    frames_limit: int | None = None,
    read_again: Callable[[], Settings] | None = None,
    folder: Path | None = None,
) -> None:
    """Run the agent to its end; `read_again` reads the settings anew at SIGHUP, `folder` is that of their file.

    Raises FlawlineError where it cannot start.
    """
    keep_memory_flat()
    # A thread that computes gives way after this time: a verdict at its deadline does not wait for 5 ms of it.
    sys.setswitchinterval(0.0005)
    cv2.setNumThreads(1)  # converting a frame is quick; handing it to threads and waiting for them is not
    with contextlib.ExitStack() as stack:
        manager = ServiceManager()
        stack.callback(manager.close)
        if await until_there(settings, manager):
            agent = Agent(settings, frames_limit, read_again or (lambda: settings), manager, stack, folder)
            await agent.run()


@contextlib.contextmanager
def _context() -> Iterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    try:
        yield context
    finally:
        context.destroy(linger=2000)


def _helpers() -> ThreadPoolExecutor:
    """For what waits or computes beside the loop. All threads at once: later one would come with every busy moment."""
    pool = ThreadPoolExecutor(_HELPERS, "helper")
    all_there = threading.Barrier(_HELPERS)
    for _ in range(_HELPERS):
        pool.submit(all_there.wait)
    return pool


def _first_of_ours(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that says what was wrong, out of what a task group collected; else the group itself."""
    for error in failures.exceptions:
        if isinstance(error, FlawlineError):
            return error
        if isinstance(error, BaseExceptionGroup) and isinstance(ours := _first_of_ours(error), FlawlineError):
            return ours
    return failures
