"""The agent: what belongs together, started in order, stopped in the other order."""

import asyncio
import hashlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from functools import partial

import structlog
import zmq.asyncio

from flawline import __version__
from flawline.agent.control import Control
from flawline.agent.journal import Journal
from flawline.agent.metrics import Metrics
from flawline.agent.pipeline import Pipeline
from flawline.agent.preview import Preview
from flawline.agent.publisher import Publisher
from flawline.agent.verdict import ActiveRecipe, VerdictWriter
from flawline.agent.wire import STATUS_SCHEMA, Header
from flawline.agent.worker_client import WorkerClient
from flawline.camera.registry import make_camera
from flawline.camera.ring import FrameRing
from flawline.config.settings import Settings

log = structlog.get_logger()


def active_recipes(settings: Settings) -> dict[str, ActiveRecipe]:
    """Every recipe of the file, as version 1."""
    return {
        name: ActiveRecipe(
            name, 1, recipe, hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(), recipe.threshold
        )
        for name, recipe in settings.recipes.items()
    }


async def run_agent(settings: Settings, frames_limit: int | None = None) -> int:
    """Run until a signal, or until `frames_limit` verdicts are out. Raises FlawlineError at the start."""
    boot_id = secrets.token_hex(8)
    recipes = active_recipes(settings)
    cameras = [(make_camera(camera), recipes[camera.recipe]) for camera in settings.cameras]
    journal = Journal(settings.journal.path / settings.station, settings.journal.durability)
    context = zmq.asyncio.Context()
    ring: FrameRing | None = None
    try:
        publisher = Publisher(context, settings.publish, settings.station)
        slots = len(cameras) * (settings.worker.queue_depth + 4) + 2
        ring = FrameRing(slots, int(settings.worker.max_frame_mpx * 1e6))
        writer = VerdictWriter(settings.station, boot_id, __version__)
        pipeline = Pipeline(settings, ring, recipes, writer, journal, publisher, frames_limit)
        tables = {recipe.key: recipe.recipe.model_dump(mode="json") for recipe in recipes.values()}
        worker = WorkerClient(
            ring, settings.model, settings.worker, tables, pipeline.on_message, pipeline.on_worker_lost
        )
        pipeline.worker = worker
        status = partial(station_status, pipeline, worker, journal, boot_id)
        control = Control(context, settings.control, pipeline, status)
        preview: Preview | None = None
        if settings.preview.enabled:
            metrics = Metrics(status)
            names = [camera.name for camera in settings.cameras]
            preview = Preview(settings.preview, settings.station, names, status, metrics)
            await preview.start()
            pipeline.observers.add(metrics)
            pipeline.observers.add(preview)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        log.info("starting", station=settings.station, boot_id=boot_id, pid=os.getpid(), last_seq=journal.last_seq)
        if journal.seq_jump:
            log.warning("numbers_jump", seq_jump=journal.seq_jump, set_aside=str(journal.set_aside))
        try:
            await worker.start()
            writer.models_are(worker.about["bundle"], worker.about["bundle_sha256"])
            async with asyncio.TaskGroup() as services:
                tasks = [
                    services.create_task(worker.run()),
                    services.create_task(pipeline.publish_all()),
                    services.create_task(_say_status(publisher, pipeline, worker, status)),
                    services.create_task(control.serve()),
                ]
                if preview is not None:
                    tasks.append(services.create_task(preview.run()))
                grabbing = [services.create_task(pipeline.run_camera(camera, recipe)) for camera, recipe in cameras]
                waits = [services.create_task(stop.wait()), services.create_task(pipeline.done.wait())]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                await pipeline.stop_intake()
                for wait in waits:
                    wait.cancel()
                await asyncio.wait(grabbing, timeout=5)
                for grab in grabbing:
                    grab.cancel()
                await pipeline.drain(settings.worker.drain_s)
                for task in tasks:
                    task.cancel()
        finally:
            if preview is not None:
                await preview.close()
            await worker.stop()
            control.close()
            pipeline.close()
            publisher.close()
        log.info("stopped", **pipeline.counts)
    finally:
        context.destroy(linger=2000)
        journal.close()
        if ring is not None:
            ring.close()
    return 0


async def _say_status(
    publisher: Publisher, pipeline: Pipeline, worker: WorkerClient, status: Callable[[], Header]
) -> None:
    """Once a second, so that silence means a fault."""
    while True:
        if not worker.healthy:
            pipeline.on_worker_unhealthy()
        await publisher.status(status())
        await asyncio.sleep(1.0)


def station_status(pipeline: Pipeline, worker: WorkerClient, journal: Journal, boot_id: str) -> Header:
    """What the station is doing, for subscribers and for the `status` command."""
    state = "stopping" if pipeline.stopping.is_set() else "running" if worker.ready else "degraded"
    return {
        "schema": STATUS_SCHEMA,
        "boot_id": boot_id,
        "t": time.time_ns(),
        "last_seq": journal.last_seq,
        "seq_jump": list(journal.seq_jump) if journal.seq_jump else None,
        "state": state,
        "worker": {"pid": worker.pid, "ready": worker.ready, "healthy": worker.healthy, "restarts": worker.restarts},
        **pipeline.status(),
    }
