"""The PUB socket: verdicts and masks go out here. A slow subscriber costs only itself.

Sending never waits: what a subscriber has not taken is kept up to the high-water mark, then it loses the newest.
A subscriber that does not answer ZeroMQ's heartbeats is dropped with all that was kept for it.
"""

import zmq

from flawline.agent import wire
from flawline.agent.endpoint import Endpoint
from flawline.agent.security import Curve
from flawline.config.settings import PublishSettings

_HEARTBEAT_MS = 5000


class Publisher:
    """Binds at once, so that subscribers are connected before the first verdict."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], settings: PublishSettings, station: str) -> None:
        curve = Curve.of("publish", settings)
        self._station = station
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, settings.high_water_mark)
        self._socket.setsockopt(zmq.LINGER, 2000)
        # Subscriptions, and a handshake's commands, are all that may come in; the longest topic has 140 bytes.
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1024)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
        if curve is not None:
            curve.guard(self._socket)
        self._endpoint = Endpoint(self._socket, settings.endpoint, "publish.endpoint")

    def verdict(self, header: wire.Header) -> None:
        """One verdict, as journalled but for the time at which it leaves."""
        self._send(wire.verdict_topic(self._station, header["camera"]), wire.pack(header))

    def late(self, header: wire.Header) -> None:
        """The result that came after its `error: deadline` verdict."""
        self._send(wire.late_topic(self._station, header["camera"]), wire.pack(header))

    def mask(
        self, verdict: wire.Header, shape: tuple[int, int], encoding: str, payload: bytes, *, refined: bool = False
    ) -> None:
        """The mask that belongs to a verdict; `refined`: the second one, after SAM has run."""
        header = {
            "schema": wire.MASK_SCHEMA,
            **{key: verdict[key] for key in ("seq", "station", "camera", "frame_id")},
            "shape": list(shape),
            "encoding": encoding,
            "refined": refined,
        }
        self._send(wire.mask_topic(self._station, verdict["camera"]), wire.pack(header), payload)

    def status(self, status: wire.Header) -> None:
        """The station's status."""
        self._send(wire.status_topic(self._station), wire.pack(status))

    def _send(self, *parts: bytes) -> None:
        self._socket.send_multipart(parts, zmq.NOBLOCK)

    def close(self) -> None:
        """Send what is queued, for two seconds at most."""
        self._socket.close()
        self._endpoint.remove_file()
