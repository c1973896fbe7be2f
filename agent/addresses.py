"""Addresses of this machine that are not there yet: at boot the agent may come before the switch or the DHCP server."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import time

import structlog
import zmq

from flawline.agent.endpoint import has_ipv6, may_come
from flawline.agent.guard import refuse_open
from flawline.agent.notify import ServiceManager
from flawline.agent.security import Curve
from flawline.config.errors import FlawlineError
from flawline.config.settings import Settings

log = structlog.get_logger()
_LIMIT_S = 300.0
_PAUSE_S = 1.0


async def until_there(settings: Settings, manager: ServiceManager, limit_s: float = _LIMIT_S) -> bool:
    """Wait until this machine has every address that is to be bound; False where a signal came first.

    What else is wrong with an address is left to who binds it. Raises ConfigError for one that must not be left open;
    a FlawlineError that is none after the limit: the service is then started again.
    """
    missing = await _missing(settings)
    if not missing:
        return True
    Curve.files("publish", settings.publish)  # what would be refused afterwards is not waited for
    Curve.files("control", settings.control, settings.publish)
    if settings.preview.enabled:
        refuse_open(settings.preview)
    loop, stop, end = asyncio.get_running_loop(), asyncio.Event(), time.monotonic() + limit_s
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    said: dict[str, str] = {}
    try:
        while missing:
            for key in missing.keys() - said.keys():
                log.warning("address_is_not_there_yet", key=key, address=missing[key][0], error=missing[key][1])
            said |= {key: address for key, (address, _) in missing.items()}
            manager.starting(f"waiting for an address: {', '.join(f'{key} {missing[key][0]}' for key in missing)}")
            if time.monotonic() >= end:
                key, (address, error) = next(iter(missing.items()))
                raise FlawlineError(f"{key}: {address} cannot be bound: {error}, for {limit_s:.0f} s now")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE_S):
                    await stop.wait()
            if stop.is_set():
                log.info("stopped")
                return False
            missing = await _missing(settings)
            for key in said.keys() - missing.keys():
                log.info("address_is_there", key=key, address=said.pop(key))
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return True


async def _missing(settings: Settings) -> dict[str, tuple[str, str]]:
    """By key: the address and what the kernel says of it."""
    found = {}
    for key, address in (
        ("publish.endpoint", settings.publish.endpoint),
        ("control.endpoint", settings.control.endpoint),
    ):
        if (error := _socket_misses(address)) is not None:
            found[key] = address, error
    preview = settings.preview
    if preview.enabled and (error := await page_misses(preview.host)) is not None:
        found["preview.host"] = preview.host, error
    return found


def _socket_misses(address: str) -> str | None:
    """What ZeroMQ says where it could bind the address if only it were there; any port will do to find out."""
    if not address.startswith("tcp://"):
        return None
    with zmq.Context() as context, context.socket(zmq.PUB) as probe:
        try:
            probe.setsockopt(zmq.IPV6, has_ipv6(address))
            probe.bind(f"{address.rpartition(':')[0]}:*")
        except zmq.ZMQError as error:
            return str(error.strerror) if may_come(error.errno, address) else None
    return None


async def page_misses(host: str) -> str | None:
    """What the kernel says where this machine has none of the addresses that the host stands for; else None."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return None
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                continue
        return None
    return os.strerror(errno.EADDRNOTAVAIL)
