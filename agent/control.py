"""The ROUTER socket that takes commands: one request, one reply; what is malformed gets an error reply."""

from collections.abc import Callable
from typing import Any

import structlog
import zmq
import zmq.asyncio

from flawline.agent.pipeline import Pipeline
from flawline.agent.publisher import require_loopback
from flawline.agent.wire import Header, pack, unpack
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.settings import ControlSettings

log = structlog.get_logger()
MAX_REPLAY = 500
"""Verdicts in one reply to `replay`; the client goes on with `next_seq`."""


class Control:
    """Serves `status`, `replay` and `feedback`."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        settings: ControlSettings,
        pipeline: Pipeline,
        status: Callable[[], Header],
    ) -> None:
        require_loopback("control.endpoint", settings.endpoint, settings.insecure)
        self._pipeline = pipeline
        self._status = status
        self._limit = settings.max_message_bytes
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, settings.max_message_bytes)
        try:
            self._socket.bind(settings.endpoint)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ConfigError(f"control.endpoint: {settings.endpoint} cannot be bound: {error}") from error

    async def serve(self) -> None:
        """Answer until cancelled."""
        while True:
            parts = await self._socket.recv_multipart()
            reply = await self._reply(parts[2:] if len(parts) > 1 and parts[1] == b"" else [])
            await self._socket.send_multipart([parts[0], b"", pack(reply)])

    async def _reply(self, body: list[bytes]) -> Header:
        request: Header = {}
        try:
            if len(body) != 1:
                raise ValueError("write [empty frame, msgpack map]")
            request = unpack(body[0], self._limit)
            answer = await self._do(request)
        except (ValueError, FlawlineError) as error:
            return {"id": request.get("id"), "ok": False, "error": str(error)}
        except Exception as error:  # a command must not end the agent
            log.exception("command_failed", cmd=str(request.get("cmd")))
            return {"id": request.get("id"), "ok": False, "error": f"internal: {type(error).__name__}"}
        return {"id": request.get("id"), "ok": True, **answer}

    async def _do(self, request: Header) -> Header:
        match request.get("cmd"):
            case "status":
                return self._status()
            case "replay":
                first = _integer(request, "from_seq", 1)
                last = None if request.get("to_seq") is None else _integer(request, "to_seq", 1)
                limit = min(_integer(request, "limit", 1, MAX_REPLAY), MAX_REPLAY)
                journal = self._pipeline.journal
                verdicts, next_seq, done = await self._pipeline.on_journal(journal.replay, first, last, limit)
                return {"verdicts": verdicts, "next_seq": next_seq, "done": done}
            case "feedback":
                texts = [_text(request, key) for key in ("label", "who", "note")]
                await self._pipeline.on_journal(self._pipeline.journal.feedback, _integer(request, "seq", 1), *texts)
                return {}
            case other:
                raise ValueError(f"cmd {other!r} is not known; there are status, replay, feedback")

    def close(self) -> None:
        """Send what is queued, for half a second at most."""
        self._socket.close()


def _integer(request: Header, key: str, least: int, default: int | None = None) -> int:
    value: Any = request.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{key} must be a whole number of at least {least}")
    return value


def _text(request: Header, key: str) -> str:
    value = request.get(key, "")
    if not isinstance(value, str) or len(value) > 2000:
        raise ValueError(f"{key} must be a text of at most 2000 characters")
    return value


def ask(endpoint: str, request: Header, timeout_s: float = 5.0) -> Header:
    """One request from a client, blocking. Raises ConfigError where nobody answers, ValueError on a refusal."""
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
    try:
        socket.connect(endpoint)
        socket.send(pack(request))
        reply = unpack(socket.recv(), 1 << 26)
    except zmq.ZMQError as error:
        raise ConfigError(f"--endpoint {endpoint}: no agent answers: {error}") from error
    finally:
        context.destroy(linger=0)
    if not reply.get("ok"):
        raise ValueError(str(reply.get("error")))
    return reply
