"""The real worker process over a real socket pair and ring: loads, judges, ends with the agent."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flawline.camera.ring import FrameRing
from flawline.models import protocol
from flawline.models import worker as worker_module
from flawline.models.engine import Judgement
from flawline.models.noop import NoopEngine
from flawline.models.worker import Worker


@pytest.fixture
def ring() -> Iterator[FrameRing]:
    ring = FrameRing(2, 640 * 480)
    yield ring
    ring.close()


@pytest.fixture
def worker(ring: FrameRing) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "flawline.models.worker", str(theirs.fileno()), str(ring.fd)),
            *(str(ring.slots), str(ring.max_pixels), "flawline.models.noop:NoopEngine"),
        ],
        pass_fds=(theirs.fileno(), ring.fd),
    )
    theirs.close()
    ours.settimeout(30)
    yield ours, process
    ours.close()
    assert process.wait(10) == 0


def receive(channel: socket.socket) -> protocol.Message:
    return protocol.unpack(channel.recv(protocol.PACKET_BYTES))


@pytest.mark.parametrize("maps", [True, False])
def test_one_inspection_from_load_to_result(
    ring: FrameRing, worker: tuple[socket.socket, subprocess.Popen[bytes]], maps: bool
) -> None:
    channel, process = worker
    channel.send(protocol.pack(protocol.load("noop", "cpu", "fp32", None, {"default@1": {}}, maps=maps)))
    ready = receive(channel)
    assert (ready["op"], ready["pid"]) == ("ready", process.pid)
    channel.send(protocol.pack({"op": "ping", "n": 7}))
    pong = receive(channel)
    assert (pong["op"], pong["n"]) == ("pong", 7)
    channel.send(protocol.pack(protocol.inspect(3, 1, 480, 640, "default@1", None)))
    assert receive(channel)["op"] == "began"
    result = receive(channel)
    assert (result["op"], result["job"], len(result["defects"])) == ("result", 3, 1)
    x, y, w, h = result["defects"][0]["bbox"]
    mask = ring.mask(1, 480, 640)
    assert (mask[y : y + h, x : x + w] == 255).all()
    assert int((mask == 255).sum()) == result["defects"][0]["area_px"] == w * h
    assert ring.anomaly_map(1, 480, 640).any() == maps


def test_worker_ends_when_the_agent_is_gone(worker: tuple[socket.socket, subprocess.Popen[bytes]]) -> None:
    channel, process = worker
    channel.close()
    assert process.wait(10) == 0


class OutOfMemoryError(RuntimeError):
    """Called like CUDA's."""


class AcceleratorError(RuntimeError):
    """Called like CUDA's."""


class ShortOfMemory(NoopEngine):
    """Its memory holds `room` tiles at once."""

    def __init__(self, room: int, error: RuntimeError) -> None:
        super().__init__()
        self.room = room
        self.error = error
        self.tile_batch: int | None = None
        self.tried: list[int | None] = []

    def inspect(self, *arguments: Any) -> Judgement:
        self.tried.append(self.tile_batch)
        if (self.tile_batch or 4) > self.room:
            raise self.error
        return super().inspect(*arguments)


@pytest.mark.parametrize(
    "error",
    [OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_is_tried_again_tile_by_tile_and_only_that_picture(ring: FrameRing, error: RuntimeError) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = ShortOfMemory(1, error)
        worker = Worker(ours, ring, engine)
        message = protocol.inspect(1, 0, 48, 64, "default@1", None)
        for _ in range(2):
            judged = worker._inspect_with_retry(np.zeros((48, 64, 3), np.uint8), message, None)
            assert judged.result.defects
        assert engine.tried == [None, 1, None, 1]
        engine.room = 0
        with pytest.raises(MemoryError, match=str(error)):
            worker._inspect_with_retry(np.zeros((48, 64, 3), np.uint8), message, None)


@pytest.mark.parametrize(
    ("error", "leaves"),
    [
        (AcceleratorError("an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("sizes do not match"), False),
    ],
)
def test_a_worker_whose_gpu_is_lost_answers_and_makes_room_for_another(
    ring: FrameRing, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, leaves: bool
) -> None:
    left: list[int] = []
    monkeypatch.setattr(worker_module.os, "_exit", left.append)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        Worker(ours, ring, ShortOfMemory(0, error))._inspect(protocol.inspect(7, 0, 48, 64, "default@1", None))
        assert receive(theirs)["op"] == "began"
        failed = receive(theirs)
    assert (failed["op"], failed["job"], failed["reason"]) == ("failed_job", 7, "internal")
    assert left == [1] * leaves


class NoRoomForRecipes(NoopEngine):
    """Its GPU is full when a memory comes."""

    error: RuntimeError

    def add_recipe(self, *_: Any) -> float:
        raise self.error


def test_a_recipe_for_which_there_is_no_room_is_refused_and_the_others_go_on(ring: FrameRing) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        engine = NoRoomForRecipes()
        worker = Worker(ours, ring, engine)
        engine.error = OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        worker._add_recipe({"op": "recipe", "key": "new@2", "table": {}})
        refused = receive(theirs)
        assert (refused["key"], refused["error"]) == ("new@2", "CUDA out of memory. Tried to allocate 2 GiB")
        engine.error = AcceleratorError("an illegal memory access was encountered")
        with pytest.raises(RuntimeError, match="illegal"):
            worker._add_recipe({"op": "recipe", "key": "new@2", "table": {}})
