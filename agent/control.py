"""The ROUTER socket that takes commands: one request, one reply; what is malformed gets an error reply."""

import asyncio
from pathlib import Path

import structlog
import zmq
import zmq.asyncio

from flawline.agent.commands import Commands, shorten
from flawline.agent.endpoint import Endpoint, has_ipv6
from flawline.agent.security import Curve, connect_curve
from flawline.agent.wire import Header, pack, unpack
from flawline.config.errors import ConfigError, FlawlineError, NoAnswer
from flawline.config.settings import ControlSettings, PublishSettings

log = structlog.get_logger()
_AT_ONCE = 64
"""Requests in work; further ones wait in ZeroMQ's queues, and then at the clients."""
_PARTS = 3  # of a request: who asks, an empty frame, the map
_CHANGING: dict[str, tuple[str, ...]] = {
    "pause": (),
    "resume": (),
    "recipe.activate": ("camera",),
    "feedback": ("seq", "label"),
    "learn.start": ("camera", "count"),
    "learn.commit": (),
    "learn.discard": (),
}
"""Commands that change how the line judges, and what stands in the log of their requests: keys that they check."""
LARGEST_REPLY = 1 << 26
"""Bytes that a client takes: 64 MiB, far above a page of verdicts and the largest mask."""


class Control:
    """Reads requests, has `commands` carry them out, sends replies."""

    def __init__(self, context: zmq.asyncio.Context, settings: ControlSettings, publish: PublishSettings) -> None:
        curve = Curve.of("control", settings, publish)
        self._limit = settings.max_message_bytes
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        # Above the limit there is a refusal to read; only what is far above it costs the client its connection.
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4 * settings.max_message_bytes)
        self._socket.setsockopt(zmq.RCVHWM, _AT_ONCE)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        if curve is not None:
            curve.guard(self._socket)
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._endpoint = Endpoint(self._socket, settings.endpoint, "control.endpoint")

    async def serve(self, commands: Commands) -> None:
        """Answer until cancelled, several at once, so that a slow command holds up no trigger."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._places.acquire()
                group.create_task(self._answer(commands, await self._receive()))

    async def _receive(self) -> list[zmq.Frame]:
        """One request's parts, one more than it may have at most: whatever follows is thrown away as it is read."""
        parts = [await self._socket.recv(copy=False)]
        while self._socket.getsockopt(zmq.RCVMORE):
            part = await self._socket.recv(copy=False)
            if len(parts) <= _PARTS:
                parts.append(part)
        return parts

    async def _answer(self, commands: Commands, parts: list[zmq.Frame]) -> None:
        try:
            body = parts[2:] if len(parts) > 1 and not len(parts[1]) else []
            reply = await self._reply(commands, body)
            try:
                data = pack(reply)
            except (ValueError, TypeError, OverflowError):
                data = pack({"id": None, "ok": False, "error": "the id cannot be given back"})
            await self._socket.send_multipart([parts[0].bytes, b"", data])
        finally:
            self._places.release()

    async def _reply(self, commands: Commands, body: list[zmq.Frame]) -> Header:
        request: Header = {}
        try:
            if len(body) != 1:
                raise ValueError("write [empty frame, msgpack map]")
            request = unpack(body[0].bytes, self._limit)
            answer = await commands.do(request)
            _note(request, answer, body[0])
        except (ValueError, FlawlineError) as error:
            return {"id": request.get("id"), "ok": False, "error": str(error)}
        except Exception as error:  # a command must not end the agent
            log.exception("command_failed", cmd=shorten(request.get("cmd")))
            return {"id": request.get("id"), "ok": False, "error": f"internal: {type(error).__name__}"}
        return {"id": request.get("id"), "ok": True, **answer}

    def close(self) -> None:
        """Send what is queued, for half a second at most."""
        self._socket.close()
        self._endpoint.remove_file()


def _note(request: Header, answer: Header, frame: zmq.Frame) -> None:
    """What changes how the line judges stands in the log, with who asked for it."""
    cmd = request["cmd"]
    if cmd not in _CHANGING:
        return
    recipe = answer.get("recipe")
    fields = {
        **{key: request.get(key) for key in _CHANGING[cmd]},
        "cameras": answer.get("cameras"),
        "recipe": f"{recipe['id']}@{recipe['version']}" if isinstance(recipe, dict) else recipe,
        "who": _property(frame, "User-Id"),  # the client's key file, where there is CURVE
        "address": _property(frame, "Peer-Address"),
    }
    log.info(f"command_{cmd.replace('.', '_')}", **{key: value for key, value in fields.items() if value is not None})


def _property(frame: zmq.Frame, name: str) -> str | None:
    """Of the connection that it came over."""
    try:
        return str(frame.get(name)) or None
    except (zmq.ZMQError, KeyError, UnicodeDecodeError):
        return None


def ask(endpoint: str, request: Header, timeout_s: float = 5.0, keys: tuple[Path, Path] | None = None) -> Header:
    """One request from a client, blocking; `keys`: the server's public and the client's secret key file.

    Raises NoAnswer where nobody does, ConfigError for what is no address, ValueError on a refusal.
    """
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
    socket.setsockopt(zmq.SNDTIMEO, int(timeout_s * 1000))
    socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_REPLY)
    try:
        if keys is not None:
            connect_curve(socket, *keys)
        socket.setsockopt(zmq.IPV6, has_ipv6(endpoint))
        socket.connect(endpoint)
        socket.send(pack(request))
        reply = unpack(socket.recv(), LARGEST_REPLY)
    except zmq.Again as error:
        keyless = "" if keys else "; one that demands CURVE answers nobody without --server-key and --client-key"
        raise NoAnswer(f"--endpoint {endpoint}: no agent answers within {timeout_s:g} s{keyless}") from error
    except zmq.ZMQError as error:
        raise ConfigError(f"--endpoint {endpoint}: no agent answers: {error}") from error
    finally:
        context.destroy(linger=0)
    if not reply.get("ok"):
        raise ValueError(str(reply.get("error")))
    return reply
