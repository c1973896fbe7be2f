"""The worker process: holds CLIP and SAM, judges frames from the ring one after the other.

Two threads: the reader answers pings and sorts messages, so that a ping is answered while a frame is judged;
the main thread judges. When the agent is gone the socket ends, and so does this process at once.
Started by the agent as `python -m flawline.models.worker SOCKET_FD RING_FD SLOTS MAX_PIXELS ENGINE`.
"""

import ctypes
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from importlib import import_module
from typing import Any

import cv2
import numpy as np
import structlog

from flawline.camera.ring import SlotViews
from flawline.config.errors import ConfigError, FlawlineError, ImageError
from flawline.config.logging import set_up_logging
from flawline.config.recipe import Recipe
from flawline.config.settings import LogSettings
from flawline.models import protocol
from flawline.models.engine import Engine, Judgement
from flawline.models.heap import keep_blocks
from flawline.models.lean_imports import lean_imports
from flawline.models.protocol import Message

log = structlog.get_logger()
_PR_SET_PDEATHSIG = 1


def make_engine(name: str) -> Engine:
    """The engine called `module:class`. Raises ConfigError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        with lean_imports():
            engine: Engine = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"worker.engine: {name} cannot be loaded: {error}") from error
    return engine


class Worker:
    """Serves one agent over one socket until it says stop or is gone."""

    def __init__(self, channel: socket.socket, slots: SlotViews, engine: Engine) -> None:
        self._channel = channel
        self._slots = slots
        self._engine = engine
        self._maps = True
        self._work: queue.Queue[Message] = queue.Queue(maxsize=1024)
        self._sending = threading.Lock()

    def run(self) -> int:
        """Until told to stop. Returns the exit code."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        while True:
            message = self._work.get()
            match message["op"]:
                case "load":
                    if not self._load(message):
                        return 1
                case "recipe":
                    self._add_recipe(message)
                case "inspect":
                    self._inspect(message)
                case "learn":
                    self._learn(message)
                case "stop":
                    return 0

    def _send(self, op: str, **fields: Any) -> None:
        data = protocol.pack({"op": op, **fields})
        with self._sending:
            try:
                self._channel.sendall(data)
            except OSError:  # the agent is gone: nothing is left to do
                os._exit(0)

    def _read(self) -> None:
        while True:
            try:
                data = self._channel.recv(protocol.PACKET_BYTES)
            except OSError:
                data = b""
            if not data:
                os._exit(0)  # the agent is gone; the main thread may be deep inside an inspection
            message = protocol.unpack(data)
            if message["op"] == "ping":
                self._send("pong", n=message["n"], gpu_memory_bytes=_gpu_memory_bytes())
            else:
                self._work.put(message)

    def _load(self, message: Message) -> bool:
        started = time.monotonic()
        self._maps = message["maps"]
        gc.disable()
        try:
            recipes = {key: Recipe.model_validate(table) for key, table in message["recipes"].items()}
            about = self._engine.load(
                message["bundle"], message["device"], message["precision"], message["threads"], recipes
            )
            gc.freeze()  # what is loaded by now stays: the collector need not look at it while a verdict waits
        except FlawlineError as error:
            self._send("failed", error=str(error), exit_code=error.exit_code)
            return False
        finally:
            gc.enable()
        self._send("ready", about=about, seconds=time.monotonic() - started, pid=os.getpid())
        return True

    def _add_recipe(self, message: Message) -> None:
        try:
            threshold = self._engine.add_recipe(message["key"], Recipe.model_validate(message["table"]))
        except FlawlineError as error:
            self._send("recipe", key=message["key"], error=str(error))
        except RuntimeError as error:  # out of memory, most of all: the recipes that there are go on judging
            if _device_is_lost(error):
                raise
            log.exception("recipe_failed", key=message["key"])
            self._send("recipe", key=message["key"], error=str(error).partition("\n")[0] or type(error).__name__)
        else:
            self._send("recipe", key=message["key"], threshold=threshold)

    def _inspect(self, message: Message) -> None:
        job, slot, height, width = message["job"], message["slot"], message["height"], message["width"]
        self._send("began", job=job, t_start=time.time_ns())
        picture = self._slots.picture(slot, height, width)

        def answer(judgement: Judgement, *, op: str, refining: bool = False) -> None:
            result = judgement.result
            mask = self._slots.mask(slot, height, width, refined=op == "refined")
            np.multiply(result.mask.view(np.uint8), np.uint8(255), out=mask)
            if self._maps:
                cv2.convertScaleAbs(result.anomaly_map, dst=self._slots.anomaly_map(slot, height, width), alpha=255.0)
            largest = sorted(result.defects, key=lambda defect: -defect.area_px)[: protocol.MAX_DEFECTS]
            self._send(
                op,
                job=job,
                t_done=time.time_ns(),
                degraded=refining or result.degraded,
                refining=refining,
                score=float(result.score),
                threshold=float(result.threshold),
                defects=largest,
                stage_ms={stage: float(ms) for stage, ms in result.stage_ms.items()},
                points=[[float(x), float(y), int(label)] for x, y, label in judgement.points],
                warning=result.warning,
            )

        name = message.get("learn")
        copied = picture.copy() if name is not None else None  # once answered, the slot is the agent's again
        first_sent = False

        def answer_degraded(judgement: Judgement) -> None:
            nonlocal first_sent
            first_sent = True
            answer(judgement, op="result", refining=True)

        try:
            judgement = self._inspect_with_retry(picture, message, answer_degraded)
        except MemoryError as error:
            self._send("failed_job", job=job, reason="out_of_memory", error=str(error), refining=first_sent)
        except ImageError as error:
            self._send("failed_job", job=job, reason="bad_frame", error=str(error), refining=first_sent)
        except Exception as error:  # one bad inspection must not end the line; the agent counts and logs it
            text = f"{type(error).__name__}: {error}"
            log.exception("inspection_failed", job=job)
            self._send("failed_job", job=job, reason="internal", error=text, refining=first_sent)
            if _device_is_lost(error):
                log.critical("device_lost", error=text)
                os._exit(1)  # the agent starts another; an orderly end may hang in the driver
        else:
            if first_sent and judgement.result.degraded:
                self._send("unrefined", job=job)
            else:
                answer(judgement, op="refined" if first_sent else "result")
            if copied is not None:
                self._collect(job, "add", {"picture": copied, "name": name})
            return
        if name is not None:
            self._collect(job, "refuse", {"text": f"{name}: was not judged"})

    def _collect(self, job: int, action: str, fields: dict[str, Any]) -> None:
        try:
            report = self._engine.learn(action, fields)
        except FlawlineError as error:  # discarded or committed in the meantime
            report = {"error": str(error)}
        except Exception:  # learning must not end the line
            log.exception("learning_failed", job=job)
            report = {"error": "internal"}
        self._send("collected", job=job, report=report)

    def _learn(self, message: Message) -> None:
        def answer() -> None:
            try:
                result = self._engine.learn(message["action"], message["fields"])
            except FlawlineError as error:
                self._send("learn", n=message["n"], error=str(error))
            except Exception as error:  # learning must not end the line
                log.exception("learning_failed", action=message["action"])
                self._send("learn", n=message["n"], error=f"internal: {type(error).__name__}")
            else:
                self._send("learn", n=message["n"], result=result)

        if message["action"] == "commit":  # takes seconds: frames are judged meanwhile
            threading.Thread(target=answer, name="learn", daemon=True).start()
        else:
            answer()

    def _is_busy(self) -> bool:
        return not self._work.empty()

    def _inspect_with_retry(self, picture: Any, message: Message, degraded: Any) -> Judgement:
        """Out of memory: free what the allocator keeps, try once more, tile by tile, then MemoryError."""
        for attempt in (1, 2):
            self._engine.tile_batch = None if attempt == 1 else 1
            try:
                by = message["deadline_mono"]
                return self._engine.inspect(picture, message["recipe"], by, degraded, self._is_busy)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if "torch" in sys.modules:
                    sys.modules["torch"].cuda.empty_cache()  # does nothing without CUDA
                if attempt == 2:
                    raise MemoryError(str(error)) from error
        raise AssertionError("unreachable")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA's has a type of its own, the processor's allocator only says so."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _device_is_lost(error: Exception) -> bool:
    """An illegal access, a failed launch, a GPU that fell off the bus: every later call in this process fails too."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _gpu_memory_bytes() -> int:
    """What this process holds on the GPU; 0 without one. Only looks where torch was loaded and uses CUDA."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return 0
    return sum(int(cuda.memory_reserved(number)) for number in range(cuda.device_count()))


def main(arguments: list[str]) -> int:
    """Entry of the process."""
    # Whatever kills the agent takes the worker along, even one that hangs inside the driver.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the agent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    socket_fd, ring_fd, slots, max_pixels = (int(argument) for argument in arguments[:4])
    channel = socket.socket(fileno=socket_fd)
    set_up_logging(LogSettings(), process="worker")
    try:
        keep_blocks()
        engine = make_engine(arguments[4])
    except ConfigError as error:
        # Closing with the load message unread would reset the connection, and our answer would be lost with it.
        channel.recv(protocol.PACKET_BYTES)
        channel.send(protocol.pack({"op": "failed", "error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    return Worker(channel, SlotViews(ring_fd, slots, max_pixels), engine).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
