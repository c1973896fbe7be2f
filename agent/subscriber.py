"""A subscriber that misses nothing: it notices gaps in the numbers, heals them by replay, and knows when it is silent.

    with Subscriber("tcp://127.0.0.1:5555") as station:
        for verdict in station.verdicts():
            ...

ZeroMQ connects again by itself, but what was published meanwhile is gone for a PUB socket's subscriber. The numbers
show it: each verdict carries the next one, and the status message, once a second, the last one that is out.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import structlog
import zmq

from flawline.agent.control import LARGEST_REPLY, ask
from flawline.agent.endpoint import has_ipv6
from flawline.agent.security import connect_curve
from flawline.agent.wire import Header, unpack
from flawline.config.errors import FlawlineError

log = structlog.get_logger()
_LIMIT = LARGEST_REPLY  # bytes of one message; a publisher that sends a larger one is disconnected
_ASK_S = 2.0  # one attempt at a replay
_AGAIN_S = 1.0  # between two attempts: so long the socket is read after one that failed
_MUST_HAVE = ("seq", "camera_seq", "station", "camera")  # of a verdict, or it is none
_BACKLOG_S = 0.1  # what has come in by the end of a call's time is still read, for so long at most


@dataclass(frozen=True, slots=True)
class Received:
    """One message. `kind` is the first part of the topic; `replayed`: it did not arrive but was fetched."""

    kind: str  # verdict, late, mask, status
    topic: str
    header: Header
    payload: bytes | None = None
    replayed: bool = False


class Subscriber:
    """One station, or one camera of it where the topic names one. Not thread-safe.

    Where verdicts are missing, those after them wait until replay has brought them; see `held_back`.

    `from_seq` begins with the journal's verdicts from that number on; left out, with the next one that comes.
    `keys`: the server's public and the client's own secret key file. `control` is where gaps are healed; left out, what
    the station's status names. `patience_s`: when replay has failed for so long, all up to the newest is given up and
    counted as `lost` (with one camera's topic: others' numbers too); left out, it is tried for as long as it takes.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:5555",
        topic: str = "verdict/",
        *,
        also: tuple[str, ...] = (),
        control: str | None = None,
        from_seq: int | None = None,
        silence_s: float = 3.0,
        keys: tuple[Path, Path] | None = None,
        patience_s: float | None = None,
    ) -> None:
        self._patience_s = patience_s
        self._endpoint = endpoint
        self._topic = topic
        parts = topic.split("/")
        self._camera = parts[2] if len(parts) > 3 else None
        self._station_topic = "status/" + "/".join(parts[1:2]) + "/" if len(parts) > 2 else "status/"
        self._control = control
        self._keys = keys
        self._silence_s = silence_s
        # All up to this number of the station, and of the camera, is delivered or lies in `_ready`.
        self._have = None if from_seq is None else from_seq - 1
        self._camera_has: int | None = None
        self._newest = 0  # so far verdicts are known to be out
        self._camera_newest = 0
        self._behind = False
        self._failing_since = 0.0
        self._boot = ""
        self._ready: deque[Received] = deque()
        self._seq: int | None = None
        self._not_before = 0.0
        self._replay_fails = False
        self._heard = self._connected = time.monotonic()
        self.lost: list[tuple[int, int]] = []
        """Numbers that not even the journal has (dropped by its limits, or jumped over after it was damaged), and those
        that nobody fetched within `patience_s`."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        if keys is not None:
            connect_curve(self._socket, *keys)
        for prefix in {topic, self._station_topic, *also}:
            self._socket.setsockopt(zmq.SUBSCRIBE, prefix.encode())
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LIMIT)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        self._socket.setsockopt(zmq.IPV6, has_ipv6(endpoint))
        self._socket.connect(endpoint)

    @property
    def silent(self) -> bool:
        """No status for `silence_s`: the station, or the way to it, is at fault. Treat every part as a reject."""
        return time.monotonic() - self._heard > self._silence_s

    @property
    def held_back(self) -> bool:
        """Verdicts are missing and the last attempt to fetch them failed: the later ones wait, so that none overtakes.

        It is tried again every few seconds; until it succeeds no verdict comes. Treat every part as a reject.
        """
        return self._behind and self._replay_fails

    @property
    def last_seq(self) -> int | None:
        """The number of the last verdict delivered; give it to `from_seq`, plus one, to go on after a restart."""
        return self._seq

    def receive(self, timeout_s: float) -> Received | None:
        """The next message in order, or None. Verdicts come gapless; see `lost` for what is gone for good.

        Takes longer than `timeout_s` by one attempt at a replay, 2 s, at most.
        """
        end = time.monotonic() + timeout_s
        while True:
            if self._behind and not self._ready and time.monotonic() >= self._not_before:
                self._heal()
            if self._ready:
                return self._deliver(self._ready.popleft())
            wait = end - time.monotonic()
            if self._behind:
                wait = min(wait, self._not_before - time.monotonic())
            arrived = bool(self._socket.poll(max(0, int(wait * 1000))))
            if arrived:
                received = self._take(*self._socket.recv_multipart())
                if received is not None:
                    return self._deliver(received)
            else:
                self._connect_anew_if_silent()
            # A status may lie behind verdicts that wait; unread, it would make `silent` true after a long attempt.
            if time.monotonic() >= end + (_BACKLOG_S if arrived else 0.0):
                return None

    def _connect_anew_if_silent(self) -> None:
        """ZeroMQ connects again after a fault of the network, but not after what it takes for one of the protocol.

        A message that is too large is such a one. What is missed meanwhile, replay brings.
        """
        now = time.monotonic()
        if now - max(self._heard, self._connected) > self._silence_s:
            self._connected = now
            with contextlib.suppress(zmq.ZMQError):  # it has let go of the connection already
                self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)

    def verdicts(self) -> Iterator[Header]:
        """Verdicts without end, in order. While none comes nobody looks at `silent`: for a PLC take `receive`."""
        while True:
            received = self.receive(0.5)
            if received is not None and received.kind == "verdict":
                yield received.header

    def _deliver(self, received: Received) -> Received:
        if received.kind == "verdict":
            self._seq = received.header["seq"]
        return received

    def _take(self, topic: bytes, data: bytes = b"", *payload: bytes) -> Received | None:
        """What arrived, if it may go on to the user now."""
        try:
            name = topic.decode()
            received = Received(name.split("/")[0], name, unpack(data, _LIMIT), payload[0] if payload else None)
            if received.kind == "verdict" and (left_out := [key for key in _MUST_HAVE if key not in received.header]):
                raise ValueError(f"{name}: a verdict without {', '.join(left_out)}")
        except ValueError as error:
            log.warning("message_not_understood", error=str(error))
            return None
        if received.kind == "status":
            self._heard = time.monotonic()
            self._on_status(received.header)
        if received.kind != "verdict":
            return received
        header = received.header
        self._newest = max(self._newest, header["seq"])
        if self._camera is not None:
            self._camera_newest = max(self._camera_newest, header["camera_seq"])
        if self._behind or (self._have is not None and header["seq"] <= self._have):
            return None  # replay brings it in its turn, or has brought it
        if self._camera is not None and self._camera_has is not None:
            missing = header["camera_seq"] > self._camera_has + 1
        else:
            missing = self._have is not None and header["seq"] > self._have + 1
        if missing:
            self._fall_behind()
            return None
        self._have, self._camera_has = header["seq"], header["camera_seq"]
        return received

    def _on_status(self, status: Header) -> None:
        if self._control is None and isinstance(status.get("control"), str):
            self._control = _as_seen_from_here(status["control"], self._endpoint)
        last = status["last_seq"]
        camera_last = status["cameras"].get(self._camera, {}).get("camera_seq", 0)
        if self._have is not None and last < self._have and status["boot_id"] != self._boot:
            log.warning("station_counts_anew", had=self._have, last_seq=last)
            self._have, self._camera_has, self._newest, self._camera_newest = 0, None, last, 0
            self._behind = self._replay_fails = False  # what was missing belongs to the numbers before
        self._boot = status["boot_id"]
        if self._have is None:
            self._have, self._camera_has = last, camera_last  # from now on nothing is missed
        self._newest, self._camera_newest = max(self._newest, last), max(self._camera_newest, camera_last)
        if self._camera is None or self._camera_has is None:
            behind = last > self._have
        else:
            behind = camera_last > self._camera_has
        if behind:
            self._fall_behind()

    def _fall_behind(self) -> None:
        if not self._behind:
            log.info("gap", after_seq=self._have, newest=self._newest)
        self._behind = True

    def _heal(self) -> None:
        """Fetch a page of what is missing; try again later where nobody answers."""
        assert self._have is not None
        if self._control is None:
            if self._not_before:  # the next status should have named it
                self._on_failure("no status has named a control socket")
            self._not_before = time.monotonic() + _AGAIN_S
            return
        first, newest, camera_newest = self._have + 1, self._newest, self._camera_newest
        try:
            request = {"cmd": "replay", "id": 1, "from_seq": first, "to_seq": newest}
            reply = ask(self._control, request, _ASK_S, self._keys)
        except (FlawlineError, ValueError) as error:
            # Counted from now: the attempt itself may take longer than the pause, and the socket would never be read.
            self._not_before = time.monotonic() + _AGAIN_S
            self._on_failure(str(error))
            return
        if self._replay_fails:
            log.info("replay_back")
        self._not_before, self._replay_fails = 0.0, False
        for header in reply["verdicts"]:
            self._have_up_to(header["seq"] - 1)
            self._have = header["seq"]
            topic = f"verdict/{header['station']}/{header['camera']}/"
            if topic.startswith(self._topic):
                self._camera_has = header["camera_seq"]
                self._ready.append(Received("verdict", topic, header, replayed=True))
        if reply["done"]:
            self._have_up_to(newest)
            self._camera_has = max(self._camera_has or 0, camera_newest)
            self._behind = self._newest > newest

    def _on_failure(self, error: str) -> None:
        """Verdicts are held back; when the user's patience is over, what is missing is given up."""
        if not self._replay_fails:
            log.warning("replay_failed", error=error, held_back_after_seq=self._have)
            self._failing_since = time.monotonic()
        self._replay_fails = True
        if self._patience_s is not None and time.monotonic() - self._failing_since >= self._patience_s:
            self._have_up_to(self._newest)
            self._camera_has = max(self._camera_has or 0, self._camera_newest)
            self._behind = self._replay_fails = False

    def _have_up_to(self, seq: int) -> None:
        """What has not come by now is lost."""
        assert self._have is not None
        if seq > self._have:
            self.lost.append((self._have + 1, seq))
            log.warning("verdicts_lost", from_seq=self._have + 1, to_seq=seq)
            self._have = seq

    def close(self) -> None:
        """Disconnect."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_seen_from_here(control: str, publish: str) -> str:
    """An agent bound to every address names none that a client could connect to: take the publisher's host."""
    there, here = urlsplit(control), urlsplit(publish)
    if there.scheme == "tcp" and here.scheme == "tcp" and there.port is not None:
        host = f"[{here.hostname}]" if ":" in (here.hostname or "") else here.hostname
        return f"tcp://{host}:{there.port}"
    return control
