"""TCP connections to the operators' page: so many at once, and none for long that asks nothing.

Each one is a descriptor of the agent's, which its pictures, its clients and its next worker need too.
"""

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import cast

import structlog
from aiohttp import web

log = structlog.get_logger()
_SPARE = 32  # connections of one address beside its streams: a browser opens six, a scrape one
_REQUEST_S = 10.0  # a new connection's first request is whole by then
_IDLE_S = 60.0  # so long one is kept for the next request; what it was sent is taken by then


class PageConnections:
    """Gives the server its connections; `streams` are the pages and videos that may be open at once."""

    def __init__(self, streams: int) -> None:
        self._most_of_one = streams + _SPARE  # a reverse proxy is one address
        self._most = 2 * self._most_of_one
        self._of: Counter[str] = Counter()
        self._open: dict[asyncio.BaseTransport, _Connection] = {}

    def protocol(self, server: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """For `create_server`: what stands between a new connection and the server's own protocol."""
        return _Connection(self, server)

    def enter(self, connection: "_Connection", transport: asyncio.Transport) -> bool:
        """Whether there is room for it."""
        if len(self._open) >= self._most or self._of[connection.whose] >= self._most_of_one:
            log.warning("page_connections_full", address=connection.whose, open=len(self._open))
            return False
        self._open[transport] = connection
        self._of[connection.whose] += 1
        return True

    def leave(self, connection: "_Connection", transport: asyncio.Transport) -> None:
        """It is closed."""
        if self._open.pop(transport, None) is not None:
            self._of[connection.whose] -= 1
            self._of += Counter()  # forget who has none

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """A connection is not idle while its request is answered."""
        connection = None if request.transport is None else self._open.get(request.transport)
        if connection is None:
            return await handler(request)
        connection.wait_for(None)
        try:
            return await handler(request)
        finally:
            connection.wait_for(_IDLE_S)


class _Connection(asyncio.Protocol):
    """Hands everything on to the server's protocol."""

    def __init__(self, connections: PageConnections, server: Callable[[], asyncio.Protocol]) -> None:
        self._connections = connections
        self._server = server
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._end: asyncio.TimerHandle | None = None
        self.whose = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.whose = _whose(self._transport.get_extra_info("peername"))
        if not self._connections.enter(self, self._transport):
            self._transport.abort()
            return
        self._inner = self._server()
        self._inner.connection_made(transport)
        self.wait_for(_REQUEST_S)

    def wait_for(self, seconds: float | None) -> None:
        """Close it after so long; None: not while a request is answered."""
        if self._end is not None:
            self._end.cancel()
            self._end = None
        transport = self._transport
        if seconds is not None and transport is not None and not transport.is_closing():
            self._end = asyncio.get_running_loop().call_later(seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.wait_for(None)
        if self._transport is not None:
            self._connections.leave(self, self._transport)
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()


def _whose(peer: tuple[str, int] | tuple[str, int, int, int] | None) -> str:
    """The address; of IPv6 the first half, because the other one is its owner's to choose."""
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0]) if peer else None
    except ValueError:
        address = None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class _Refusals(logging.Handler):
    """What aiohttp says of requests that are none."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        log.warning("page_request_refused", reason=kind.__name__ if kind else repr(record.getMessage())[:100])


def server_log() -> logging.Logger:
    """aiohttp's own log: one bounded line of ours for each, where it would print a traceback on stderr."""
    logger = logging.Logger("page", logging.INFO)
    logger.addHandler(_Refusals())
    return logger
