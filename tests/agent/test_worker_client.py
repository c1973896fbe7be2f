"""The agent's end of a real worker process that is killed, and whose replacement is not ready in time."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flawline.agent import worker_client
from flawline.agent.worker_client import WorkerClient
from flawline.camera.ring import FrameRing
from flawline.config.errors import BundleError, WorkerError
from flawline.config.recipe import Recipe
from flawline.config.settings import ModelSettings, WorkerSettings
from flawline.models.noop import NoopEngine

NOOP = "flawline.models.noop:NoopEngine"


async def until(true: Callable[[], bool], limit_s: float = 120.0) -> None:
    for _ in range(int(limit_s / 0.02)):
        if true():
            break
        await asyncio.sleep(0.02)
    assert true()


def make_client(
    ring: FrameRing, settings: WorkerSettings, said: list[str], recipes: Callable[[], dict[str, Any]] = dict
) -> WorkerClient:
    return WorkerClient(
        *(ring, ModelSettings(), settings, recipes),
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
    await until(lambda: not client.healthy and client.hopeless)
    client._settings = settings
    await until(lambda: client.healthy and client.ready)
    assert said == ["ready", "lost", "unhealthy", "ready"]
    assert not client.hopeless
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()


async def test_a_replacement_that_hangs_is_said_before_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What waits is answered; the remedy is under way, so the service's watchdog is still fed."""
    monkeypatch.setattr(worker_client, "_PATIENCE_S", 0.3)
    ring, said = FrameRing(1, 1000), []
    client = make_client(ring, WorkerSettings(engine=NOOP, start_limit_s=120.0), said)
    await client.start()
    running = asyncio.create_task(client.run())
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 1000\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: not client.healthy, 30)
    assert said == ["ready", "lost", "unhealthy"]
    assert not client.hopeless
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()


async def test_a_process_that_cannot_die_is_replaced_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does not that hangs inside a driver: not at SIGKILL either."""
    monkeypatch.setattr(worker_client, "_DEATH_S", 0.2)
    ring, said = FrameRing(1, 1000), []
    client = make_client(ring, WorkerSettings(engine=NOOP, ping_limit_s=1.0), said)
    await client.start()
    stopped = client.pid
    assert stopped is not None
    running = asyncio.create_task(client.run())
    monkeypatch.setattr(WorkerClient, "_signal_kill", staticmethod(lambda _: None))
    os.kill(stopped, signal.SIGSTOP)
    await until(lambda: said == ["ready", "lost", "ready"])
    assert client.pid != stopped
    monkeypatch.undo()
    os.kill(stopped, signal.SIGKILL)
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()


async def test_a_process_that_cannot_be_started_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, said = FrameRing(1, 1000), []
    client = make_client(ring, WorkerSettings(engine=NOOP), said)
    await client.start()
    running = asyncio.create_task(client.run())
    start, refused = asyncio.create_subprocess_exec, []

    async def refuse_once(*arguments: Any, **more: Any) -> asyncio.subprocess.Process:
        if not refused:
            refused.append(BlockingIOError(11, "Resource temporarily unavailable"))
            raise refused[0]
        return await start(*arguments, **more)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_once)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: said == ["ready", "lost", "ready"])
    assert refused
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()


async def test_a_worker_is_started_later_where_no_file_can_be_opened_now() -> None:
    """By connections of others, for a while: the line must not end with its worker."""
    ring, said = FrameRing(1, 1000), []
    client = make_client(ring, WorkerSettings(engine=NOOP, restarts_per_minute=1000), said)
    await client.start()
    running = asyncio.create_task(client.run())
    held = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    pid = client.pid
    assert pid is not None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            while True:
                held.append(socket.socket())
        await until(lambda: said == ["ready", "lost"], 20)
        with contextlib.suppress(OSError):  # what the dead one's channel has freed, too
            while True:
                held.append(socket.socket())
        await asyncio.sleep(1.5)
        assert not running.done(), "it goes on trying"
        assert not client.ready
    finally:
        for one in held:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await until(lambda: said == ["ready", "lost", "ready"])
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()


class Exits:
    """An engine whose process is killed while it loads."""

    def load(self, *_: object) -> None:
        os._exit(9)


class Lacks:
    """An engine that finds its GPU full while it loads."""

    def load(self, *_: object) -> None:
        raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize("engine", ["Exits", "Lacks"])
async def test_a_worker_that_dies_while_loading_is_no_wrong_configuration(
    monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """With exit code 2 the service would not be started again."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    ring = FrameRing(1, 1000)
    client = make_client(ring, WorkerSettings(engine=f"test_worker_client:{engine}"), [])
    with pytest.raises(WorkerError, match="while it was loading") as caught:
        await client.start()
    assert caught.value.exit_code == 1
    await client.stop()
    ring.close()


async def test_a_wrong_engine_is_a_wrong_configuration() -> None:
    ring = FrameRing(1, 1000)
    client = make_client(ring, WorkerSettings(engine="flawline.models.noop:Nothing"), [])
    with pytest.raises(BundleError, match="Nothing"):
        await client.start()
    ring.close()


class Refuses(NoopEngine):
    """Takes no recipe at its start whose threshold is 0.9."""

    def load(
        self, bundle: str, device: str, precision: str, threads: int | None, recipes: dict[str, Recipe]
    ) -> dict[str, Any]:
        wrong = [key for key, recipe in recipes.items() if recipe.threshold == 0.9]
        if wrong:
            raise BundleError(f"recipe {wrong[0]!r}: its memory is gone")
        return super().load(bundle, device, precision, threads, recipes)


async def test_a_replacement_knows_what_judges_now_and_no_recipe_out_of_use_keeps_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    active = {"a@1": Recipe().model_dump(mode="json")}
    ring, said = FrameRing(1, 1000), []
    settings = WorkerSettings(engine="test_worker_client:Refuses", restarts_per_minute=10)
    client = make_client(ring, settings, said, lambda: active)
    await client.start()
    running = asyncio.create_task(client.run())
    assert client.about["thresholds"].keys() == {"a@1"}
    for number in range(20):
        await client.add_recipe(f"old@{number}", Recipe(threshold=0.9).model_dump(mode="json"))
    await client.add_recipe("b@1", Recipe(threshold=0.4).model_dump(mode="json"))
    active = {"b@1": Recipe(threshold=0.4).model_dump(mode="json")}
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.restarts == 1)
    assert client.about["thresholds"].keys() == {"b@1"}
    assert client.healthy
    running.cancel()
    await asyncio.wait([running])
    await client.stop()
    ring.close()


async def test_a_line_of_many_products_starts_with_all_their_recipes() -> None:
    """More than one packet holds."""
    words = tuple(f"{{}} with a mark of sort {number}" for number in range(20))
    tables = {f"product{number}@1": Recipe(states_abnormal=words).model_dump(mode="json") for number in range(500)}
    ring = FrameRing(1, 1000)
    client = make_client(ring, WorkerSettings(engine=NOOP, start_limit_s=60), [], lambda: tables)
    await client.start()
    assert client.about["thresholds"] == dict.fromkeys(tables, 0.5)
    await client.stop()
    ring.close()
