"""What comes over a socket is bounded, at either end."""

import asyncio
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any, cast

import msgpack
import pytest
import zmq
import zmq.asyncio

from flawline.agent import control, subscriber
from flawline.agent.control import Control, ask
from flawline.agent.publisher import Publisher
from flawline.agent.subscriber import Subscriber
from flawline.config.errors import NoAnswer
from flawline.config.settings import ControlSettings, PublishSettings

LIMIT = 10_000


class Commands:
    """Answers every request."""

    async def do(self, _: dict[str, Any]) -> dict[str, Any]:
        return {}


class CountingControl(Control):
    """Notes how many parts of a request it was given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.parts: list[int] = []

    async def _answer(self, commands: Any, parts: list[bytes]) -> None:
        self.parts.append(len(parts))
        await super()._answer(commands, parts)


async def test_a_request_of_many_parts_is_not_kept(tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    settings = ControlSettings(endpoint=f"ipc://{tmp_path}/control")
    served = CountingControl(context, settings, PublishSettings())
    serving = asyncio.create_task(served.serve(cast(Any, Commands())))
    client = context.socket(zmq.DEALER)
    client.connect(settings.endpoint)
    request = msgpack.packb({"cmd": "status", "id": 1})
    replies = []
    for parts in ([b"", request], [b"", *[request] * 5000], [request] * 5000, [b"", request]):
        await client.send_multipart(parts)
        replies.append(msgpack.unpackb((await asyncio.wait_for(client.recv_multipart(), 60))[1])["ok"])
    assert replies == [True, False, False, True]
    assert max(served.parts) <= 4
    serving.cancel()
    await asyncio.wait([serving])
    served.close()
    context.destroy(linger=0)


def test_a_request_that_is_too_large_or_no_msgpack_is_refused_in_words(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    settings = ControlSettings(endpoint=f"ipc://{tmp_path}/control")

    async def serve(until: asyncio.Event) -> None:
        own = zmq.asyncio.Context()
        served = Control(own, settings, PublishSettings())
        serving = asyncio.create_task(served.serve(cast(Any, Commands())))
        await until.wait()
        serving.cancel()
        await asyncio.wait([serving])
        served.close()
        own.destroy(linger=0)

    async def client() -> list[dict[str, Any]]:
        end = asyncio.Event()
        serving = asyncio.create_task(serve(end))
        asked = zmq.asyncio.Context.shadow(context.underlying).socket(zmq.REQ)
        asked.connect(settings.endpoint)
        replies = []
        for body in (
            msgpack.packb({"cmd": "status", "id": 1, "x": "y" * settings.max_message_bytes}),
            b"\xc1",
            b"\x91" * 2000,
            msgpack.packb({"cmd": "status", "id": 2}),
        ):
            await asked.send(body)
            replies.append(msgpack.unpackb(await asyncio.wait_for(asked.recv(), 20)))
        asked.close(linger=0)
        end.set()
        await serving
        return replies

    large, unknown, deep, good = asyncio.run(client())
    assert "larger than 65536" in large["error"]
    assert all(reply["error"].startswith("not msgpack: ") and len(reply["error"]) > 15 for reply in (unknown, deep))
    assert good == {"id": 2, "ok": True}


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


def test_a_subscriber_takes_no_larger_message(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber, "_LIMIT", LIMIT)
    publisher = context.socket(zmq.PUB)
    publisher.bind(f"ipc://{tmp_path}/out")
    with Subscriber(f"ipc://{tmp_path}/out", also=("mask/",), silence_s=0.5) as station:
        sizes: list[int] = []

        def send(size: int) -> bool:
            """Whether the subscriber has taken anything."""
            publisher.send_multipart([b"mask/line1/top/", msgpack.packb({}), bytes(size)])
            received = station.receive(0.2)
            sizes.extend([len(received.payload or b"")] if received is not None else [])
            return received is not None

        end = time.monotonic() + 60
        for _ in range(3):
            while not send(LIMIT // 2):
                assert time.monotonic() < end
            send(2 * LIMIT)  # costs the connection, which comes back
        assert set(sizes) == {LIMIT // 2}


def test_a_client_takes_no_larger_reply(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LARGEST_REPLY", LIMIT)
    # What would refuse it after it has been received whole:
    monkeypatch.setattr(control, "unpack", lambda data, _limit: {"ok": True, "bytes": len(data)})
    server = context.socket(zmq.ROUTER)
    server.bind(f"ipc://{tmp_path}/control")

    def answer(size: int) -> dict[str, Any]:
        def reply() -> None:
            sender, *_ = server.recv_multipart()
            server.send_multipart([sender, b"", bytes(size)])

        answering = Thread(target=reply)
        answering.start()
        try:
            return ask(f"ipc://{tmp_path}/control", {"cmd": "status"}, timeout_s=3.0)
        finally:
            answering.join(30)

    assert answer(LIMIT // 2)["bytes"] == LIMIT // 2
    with pytest.raises(NoAnswer, match="no agent answers"):
        answer(2 * LIMIT)


def test_a_subscription_that_is_no_topic_costs_the_connection(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    """Topics, prefixes of them and the empty one are taken, as before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"tcp://127.0.0.1:{port}"
    publisher = Publisher(context, PublishSettings(endpoint=endpoint), "s" * 64)
    heard = []
    for prefix in (b"", b"ver", f"verdict/{'s' * 64}/{'c' * 64}/".encode()):
        one = context.socket(zmq.SUB)
        one.setsockopt(zmq.SUBSCRIBE, prefix)
        one.connect(endpoint)
        heard.append(one)

    def closed_after(length: int) -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
            peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
            greeting = b""
            while len(greeting) < 64:
                greeting += peer.recv(64 - len(greeting))
            ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB"
            peer.sendall(bytes([4, len(ready)]) + ready)
            peer.sendall(b"\x02" + struct.pack(">Q", length) + b"\x01" + bytes(length - 1))
            peer.settimeout(2.0)
            try:
                while peer.recv(4096):
                    pass
            except TimeoutError:
                return False
            except ConnectionError:
                pass
            return True

    assert not closed_after(1000)
    assert closed_after(2000)
    end = time.monotonic() + 20
    for one in heard:
        while not one.poll(100):
            assert time.monotonic() < end
            publisher.verdict({"camera": "c" * 64})
    publisher.close()
