"""The agent's end of a real worker process that is killed, and whose replacement is not ready in time."""

import asyncio
import os
import signal
from collections.abc import Callable

from flawline.agent.worker_client import WorkerClient
from flawline.camera.ring import FrameRing
from flawline.config.settings import ModelSettings, WorkerSettings

NOOP = "flawline.models.noop:NoopEngine"


async def until(true: Callable[[], bool], limit_s: float = 120.0) -> None:
    for _ in range(int(limit_s / 0.02)):
        if true():
            break
        await asyncio.sleep(0.02)
    assert true()


async def test_a_replacement_that_is_not_ready_in_time_is_said_at_once() -> None:
    ring = FrameRing(1, 1000)
    settings = WorkerSettings(engine=NOOP, start_limit_s=120.0, restarts_per_minute=1000)
    said: list[str] = []
    client = WorkerClient(
        *(ring, ModelSettings(), settings, {}),
        on_message=lambda message: said.append(message["op"]),
        on_ready=lambda _: said.append("ready"),
        on_lost=lambda: said.append("lost"),
        on_unhealthy=lambda: said.append("unhealthy"),
    )
    await client.start()
    running = asyncio.create_task(client.run())
    client._settings = settings.model_copy(update={"start_limit_s": 0.01})  # loading takes longer than that
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: not client.healthy)
    client._settings = settings
    await until(lambda: client.healthy and client.ready)
    assert said == ["ready", "lost", "unhealthy", "ready"]
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()
