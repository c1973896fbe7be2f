"""Talking to systemd (sd_notify): ready, status, watchdog, reload, stop. Nothing happens outside a service.

The protocol is sd_notify(3): datagrams of `KEY=value` lines to the socket that NOTIFY_SOCKET names.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, MutableMapping

import structlog

from flawline.agent.wire import Header

log = structlog.get_logger()
_LOOK_EVERY_S = 1.0
_EXTEND_S = 60  # while starting, each sign of progress buys so much time


class ServiceManager:
    """The socket to systemd. Takes the variables out of the environment, so that the worker does not speak for us."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        meant = environ.pop("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.watchdog_s = int(watchdog_us) / 1e6 if watchdog_us.isdigit() and meant and int(watchdog_us) else None
        self._socket: socket.socket | None = None
        if address[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            # `@` stands for the NUL byte of an abstract socket's name.
            self._address = "\0" + address[1:] if address.startswith("@") else address
        elif address:
            log.warning("notify_socket_not_understood", address=address)

    @property
    def there(self) -> bool:
        """True in a service of Type=notify."""
        return self._socket is not None

    def tell(self, *lines: str) -> None:
        """Send `KEY=value` lines. A manager that does not listen is no reason to stop."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)

    def starting(self, text: str) -> None:
        """The start takes longer, and this is why."""
        self.tell(f"EXTEND_TIMEOUT_USEC={_EXTEND_S * 1_000_000}", f"STATUS=starting; {text}")

    def close(self) -> None:
        """No more messages."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class ServiceReporter:
    """Tells the service manager how the station is, once a second or as often as its watchdog wants it.

    `status` is the station's status as on the wire; `what_stands_still` names what makes no progress.
    """

    def __init__(
        self, manager: ServiceManager, status: Callable[[], Header], what_stands_still: Callable[[], Iterable[str]]
    ) -> None:
        self._manager = manager
        self._status = status
        self._what_stands_still = what_stands_still
        self._answered: set[str] = set()  # cameras that were up at least once
        self._said = ""
        self._still = False
        self.ready = False

    async def run(self) -> None:
        """Until cancelled."""
        if not self._manager.there:
            return
        watchdog_s = self._manager.watchdog_s
        pause_s = min(_LOOK_EVERY_S, watchdog_s / 4) if watchdog_s else _LOOK_EVERY_S
        while True:
            self.look()
            await asyncio.sleep(pause_s)

    def look(self) -> None:
        """Say what is to be said now."""
        status = self._status()
        lines = []
        cameras = status["cameras"]
        self._answered |= {name for name, camera in cameras.items() if camera["up"] or camera["state"] == "ended"}
        still = list(self._what_stands_still())
        if bool(still) != self._still:
            self._still = bool(still)
            if still:
                log.error("no_progress", what=still)
            else:
                log.info("progress_again")
        if not self.ready and status["state"] not in ("starting", "stopping"):
            self.ready = status["worker"]["ready"] and self._answered.issuperset(cameras)
            if self.ready:
                lines.append("READY=1")
                log.info("service_ready")
        if not still:
            # systemd's watchdog runs from READY on; before it, this is what a start that makes progress lives on.
            lines.append("WATCHDOG=1" if self.ready else f"EXTEND_TIMEOUT_USEC={_EXTEND_S * 1_000_000}")
        text = _sentence(status, set(cameras) - self._answered if not self.ready else set(), still)
        if text != self._said:
            self._said = text
            lines.append(f"STATUS={text}")
        if lines:
            self._manager.tell(*lines)

    def reloading(self) -> None:
        """The configuration is being read anew; `reloaded` follows."""
        self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self, what: str) -> None:
        """Done, or refused."""
        self._manager.tell(*(["READY=1"] if self.ready else []), f"STATUS={what}")

    def stopping(self) -> None:
        """From here on only what was accepted is still judged."""
        self._manager.tell("STOPPING=1", "STATUS=stopping: judging what was accepted")


def _sentence(status: Header, missing: set[str], still: list[str]) -> str:
    """For `systemctl status`, e.g. `running, demo on cuda; cameras up: top; down: side`. Counters are left to /metrics:
    this line is sent when it changes."""
    worker = status["worker"]
    up = [name for name, camera in status["cameras"].items() if camera["up"]]
    down = [name for name, camera in status["cameras"].items() if not camera["up"] and camera["state"] != "ended"]
    parts = [status["state"]]
    if worker["ready"]:
        parts[0] += f", {worker['bundle']} on {worker['device']}"
    else:
        parts.append("no worker is ready")
    if missing and status["state"] != "starting":
        parts.append(f"waiting for the first answer of: {', '.join(sorted(missing))}")
    elif down and status["state"] not in ("starting", "stopping"):
        parts.append(f"cameras down: {', '.join(down)}")
    if up:
        parts.append(f"cameras up: {', '.join(up)}")
    if not status["journal"]["ok"]:
        parts.append("the journal cannot be written")
    if still:
        parts.append(f"no progress: {', '.join(still)}")
    return "; ".join(parts).replace("\n", " ")
