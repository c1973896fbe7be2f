"""The agent's end of a real worker process that is killed, and whose replacement is not ready in time."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flawline.agent import worker_client
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


def make_client(ring: FrameRing, settings: WorkerSettings, said: list[str]) -> WorkerClient:
    return WorkerClient(
        *(ring, ModelSettings(), settings, {}),
        on_message=lambda message: said.append(message["op"]),
        on_ready=lambda _: said.append("ready"),
        on_lost=lambda: said.append("lost"),
        on_unhealthy=lambda: said.append("unhealthy"),
    )


async def test_a_worker_that_dies_while_loading_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One failed start of those that are allowed a minute is no reason to turn triggers away."""
    ring, said = FrameRing(1, 1000), []
    client = make_client(ring, WorkerSettings(engine=NOOP, restarts_per_minute=3), said)
    await client.start()
    running = asyncio.create_task(client.run())
    dies_once = tmp_path / "python"
    died = tmp_path / "died"
    dies_once.write_text(f'#!/bin/sh\n[ -e {died} ] || {{ touch {died}; exit 1; }}\nexec {sys.executable} "$@"\n')
    dies_once.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies_once))
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: died.exists() and client.ready)
    assert client.healthy
    assert said == ["ready", "lost", "ready"]
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()


async def test_a_replacement_that_is_not_ready_in_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "_PATIENCE_S", 0.0)
    ring, said = FrameRing(1, 1000), []
    settings = WorkerSettings(engine=NOOP, start_limit_s=120.0, restarts_per_minute=1000)
    client = make_client(ring, settings, said)
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
