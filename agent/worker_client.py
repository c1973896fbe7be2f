"""The agent's end of the worker: starts it, asks whether it lives, replaces it when it dies or hangs."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog

from flawline.camera.ring import FrameRing
from flawline.config.errors import BundleError, ConfigError, WorkerError
from flawline.config.settings import ModelSettings, WorkerSettings
from flawline.models import protocol
from flawline.models.protocol import Message

log = structlog.get_logger()
_PING_EVERY_S = 1.0
_MOST_ADDED = 8
_DEATH_S = 3.0
"""So long a killed process may take to be gone."""
_PATIENCE_S = 15.0
"""So long what waits is kept for a worker that does not start, which may take minutes to fail; then it is answered."""


class WorkerClient:
    """One worker process at a time. `recipes` says which a new one must know; `on_message` gets what it says of jobs,
    `on_ready` what it says of its models, `on_lost` is called when it is gone, `on_unhealthy` when it was not replaced
    in time. Without `maps` it leaves the anomaly maps out of the ring."""

    def __init__(
        self,
        ring: FrameRing,
        model: ModelSettings,
        settings: WorkerSettings,
        recipes: Callable[[], dict[str, dict[str, Any]]],
        on_message: Callable[[Message], None],
        on_ready: Callable[[dict[str, Any]], None],
        on_lost: Callable[[], None],
        on_unhealthy: Callable[[], None],
        *,
        maps: bool = True,
    ) -> None:
        self._ring = ring
        self._model = model
        self._settings = settings
        self._recipes = recipes
        self._added: dict[str, dict[str, Any]] = {}  # the latest: one may not be active yet, or waiting frames name it
        self._on_message = on_message
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_unhealthy = on_unhealthy
        self._maps = maps
        self._recipe_replies: dict[str, asyncio.Future[float]] = {}
        self._learn_replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._learn_number = 0
        self.on_collected: Callable[[int, dict[str, Any]], None] = lambda _job, _report: None
        self._process: asyncio.subprocess.Process | None = None
        self._channel: socket.socket | None = None
        self._deaths: deque[float] = deque()
        self.ready = False
        self.healthy = True
        self.hopeless = False  # unhealthy, and what was tried to mend it has failed
        self.restarts = 0
        self.about: dict[str, Any] = {}
        self._pong = 0.0
        self.gpu_memory_bytes = 0
        self.busy_since: float | None = None

    @property
    def pid(self) -> int | None:
        """The process that judges now."""
        return self._process.pid if self._process is not None else None

    @property
    def silent_s(self) -> float:
        """So long the worker owes an answer to a ping; 0 while it is being started, which has a limit of its own."""
        return time.monotonic() - self._pong if self.ready else 0.0

    async def start(self) -> None:
        """Start the process and wait until its models are warm. Raises BundleError, WorkerError."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:  # too many open files: it may go well another time, as below
            raise WorkerError(f"the worker cannot be started: {error}", "worker_lost") from error
        ours.setblocking(False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "flawline.models.worker", str(theirs.fileno()), str(self._ring.fd)),
                *(str(self._ring.slots), str(self._ring.max_pixels), self._settings.engine),
                pass_fds=(theirs.fileno(), self._ring.fd),
                stdin=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:  # too many processes, no memory for one more: it may go well another time
            ours.close()
            raise WorkerError(f"the worker cannot be started: {error}", "worker_lost") from error
        finally:
            theirs.close()
        self._channel = ours
        model = self._model
        how = (model.bundle, model.device, model.precision, model.threads)
        first, rest = protocol.that_fit(self._added | self._recipes())
        self.send(protocol.load(*how, first, maps=self._maps))
        try:
            async with asyncio.timeout(self._settings.start_limit_s):
                message = await self._receive()
                if message is not None and message["op"] == "ready":
                    for key, table in rest.items():
                        message["about"]["thresholds"][key] = await self._tell(key, table)
        except TimeoutError as error:
            await self._kill()
            raise WorkerError(
                f"the worker was not ready within worker.start_limit_s = {self._settings.start_limit_s:g}",
                "worker_lost",
            ) from error
        if message is None or message["op"] != "ready":
            await self._kill()
            if message is not None and message["exit_code"] == BundleError.exit_code:
                raise BundleError(message["error"])
            # Killed, or the GPU was full: nothing that stands in the configuration, so it may go well another time.
            why = message["error"] if message else "the worker ended while it was loading; see the log above"
            raise WorkerError(why, "worker_lost")
        self.about = message["about"]
        self.ready = True
        self.busy_since = None
        self._pong = time.monotonic()
        self._on_ready(self.about)
        log.info("worker_ready", pid=message["pid"], seconds=round(message["seconds"], 2), **self.about)

    async def _tell(self, key: str, table: dict[str, Any]) -> float:
        """A recipe that found no room in `load`, before anything else is asked of the worker."""
        answer = await self._receive() if self.send(protocol.recipe(key, table)) else None
        if answer is None or "error" in answer:
            await self._kill()
            if answer is None:
                raise WorkerError(f"the worker did not take recipe {key}", "worker_lost")
            raise BundleError(answer["error"])
        return float(answer["threshold"])

    def send(self, message: Message) -> bool:
        """Hand over one message; False where no worker is there to take it."""
        if self._channel is None:
            return False
        try:
            self._channel.send(protocol.pack(message))
        except (BlockingIOError, OSError):
            return False
        return True

    async def _receive(self) -> Message | None:
        assert self._channel is not None
        try:
            data = await asyncio.get_running_loop().sock_recv(self._channel, protocol.PACKET_BYTES)
        except OSError:
            return None
        try:
            return protocol.unpack(data) if data else None
        except ValueError as error:
            log.error("worker_talks_nonsense", error=str(error))
            return None

    async def run(self) -> None:
        """Serve until cancelled, over as many processes as it takes."""
        while True:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch())
                while (message := await self._receive()) is not None:
                    if not self._take(message):
                        break
                watch.cancel()
            self.ready = False
            await self._kill()
            log.error("worker_lost", restarts=self.restarts)
            owed: list[asyncio.Future[Any]] = [*self._recipe_replies.values(), *self._learn_replies.values()]
            for reply in owed:
                if not reply.done():
                    reply.set_exception(WorkerError("the worker died", "worker_lost"))
            self._on_lost()
            await self._replace()

    def _take(self, message: Message) -> bool:
        """False for a worker that says what was not agreed: it is replaced like one that has died."""
        try:
            match message["op"]:
                case "pong":
                    self._pong = time.monotonic()
                    self.gpu_memory_bytes = int(message["gpu_memory_bytes"])
                case "recipe":
                    reply = self._recipe_replies.get(message["key"])
                    if reply is not None and not reply.done():
                        if "error" in message:
                            reply.set_exception(ConfigError(message["error"]))
                        else:
                            reply.set_result(float(message["threshold"]))
                case "learn":
                    answer = self._learn_replies.get(message["n"])
                    if answer is not None and not answer.done():
                        if "error" in message:
                            answer.set_exception(ConfigError(message["error"]))
                        else:
                            answer.set_result(message["result"])
                case "collected":
                    self.on_collected(int(message["job"]), message["report"])
                case _:
                    self._on_message(message)
        except (KeyError, TypeError, ValueError) as error:
            log.exception("worker_talks_nonsense", op=str(message.get("op")), error=str(error))
            return False
        return True

    async def add_recipe(self, key: str, table: dict[str, Any]) -> float:
        """Make a recipe known to the worker, and to those that replace it; returns its threshold.

        Raises ConfigError where the worker refuses it, WorkerError where no worker answers.
        """
        reply: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._recipe_replies[key] = reply
        try:
            if not self.ready or not self.send(protocol.recipe(key, table)):
                raise WorkerError("the worker is not ready; try again", "worker_lost")
            async with asyncio.timeout(self._settings.job_limit_s):
                threshold = await reply
        except TimeoutError as error:
            raise WorkerError("the worker did not take the recipe in time", "worker_lost") from error
        finally:
            del self._recipe_replies[key]
        self._added[key] = table
        while len(self._added) > _MOST_ADDED:
            del self._added[next(iter(self._added))]
        return threshold

    async def learn(self, action: str, fields: dict[str, Any]) -> dict[str, Any]:
        """See `protocol.learn`. Raises ConfigError where the worker refuses, WorkerError where none answers."""
        self._learn_number += 1
        number = self._learn_number
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._learn_replies[number] = reply
        try:
            if not self.ready or not self.send(protocol.learn(number, action, fields)):
                raise WorkerError("the worker is not ready; try again", "worker_lost")
            settings = self._settings
            async with asyncio.timeout(settings.start_limit_s if action == "commit" else settings.job_limit_s):
                return await reply
        except TimeoutError as error:
            raise WorkerError(f"the worker did not answer learn.{action} in time", "worker_lost") from error
        finally:
            del self._learn_replies[number]

    async def _watch(self) -> None:
        """Kill a worker that neither answers pings nor finishes its job in time; its socket then ends.

        Or is ended from here: a process that hangs inside a driver dies only when that lets go of it.
        """
        number = 0
        killed: float | None = None
        while True:
            number += 1
            self.send({"op": "ping", "n": number})
            await asyncio.sleep(_PING_EVERY_S)
            now = time.monotonic()
            silent = now - self._pong > self._settings.ping_limit_s
            stuck = self.busy_since is not None and now - self.busy_since > self._settings.job_limit_s
            if (silent or stuck) and self._process is not None:
                log.error("worker_hangs", silent=silent, stuck=stuck)
                self._signal_kill(self._process)
                killed = now if killed is None else killed
                if now - killed > _DEATH_S and self._channel is not None:
                    self._channel.shutdown(socket.SHUT_RDWR)

    async def _replace(self) -> None:
        """Start another one. Whatever that hangs in, what waits is answered after a while."""
        patience = asyncio.get_running_loop().call_later(_PATIENCE_S, self._give_up)
        try:
            await self._start_again()
        finally:
            patience.cancel()
        self.healthy, self.hopeless = True, False
        self.restarts += 1

    async def _start_again(self) -> None:
        """But not more often than allowed a minute; what dies while loading counts too."""
        while True:
            now = time.monotonic()
            while self._deaths and now - self._deaths[0] > 60:
                self._deaths.popleft()
            if len(self._deaths) < self._settings.restarts_per_minute:
                self._deaths.append(now)
                try:
                    await self.start()
                except (BundleError, WorkerError) as error:
                    log.error("worker_does_not_start", error=str(error))
                    self._added.clear()  # the memory of one that is out of use may be gone
                    self.hopeless = not self.healthy
                else:
                    return
            else:
                self._give_up()
                self.hopeless = True
            await asyncio.sleep(0.5)

    def _give_up(self) -> None:
        """Say that there is no worker; the next one that starts ends this."""
        if self.healthy:
            self.healthy = False
            log.error("worker_unhealthy")
            self._on_unhealthy()

    @staticmethod
    def _signal_kill(process: asyncio.subprocess.Process) -> None:
        """Not `process.kill()`: that polls first, and may take the exit code away from asyncio's own waiter."""
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    async def _kill(self) -> None:
        self.ready = False
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._signal_kill(self._process)
            try:
                async with asyncio.timeout(_DEATH_S):
                    await self._process.wait()
            except TimeoutError:  # it runs no code any more, so its slots can be used again
                log.error("worker_cannot_be_killed", pid=self._process.pid)
            self._process = None

    def status(self) -> dict[str, Any]:
        """For the status message."""
        return {
            "pid": self.pid,
            "ready": self.ready,
            "healthy": self.healthy,
            "restarts": self.restarts,
            "gpu_memory_bytes": self.gpu_memory_bytes,
            **{key: self.about.get(key) for key in ("bundle", "bundle_sha256", "device", "precision")},
        }

    async def stop(self) -> None:
        """Ask it to end, and make it end."""
        self.send({"op": "stop"})
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3):
                    await self._process.wait()
        await self._kill()
