"""The PUB socket: verdicts and masks go out here. A slow subscriber costs only itself."""

import ipaddress
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from flawline.agent import wire
from flawline.config.errors import ConfigError
from flawline.config.settings import PublishSettings


def require_loopback(key: str, endpoint: str, insecure: bool) -> None:
    """Raise ConfigError for an address that other machines reach, unless the file says `insecure = true`."""
    parts = urlsplit(endpoint)
    if parts.scheme in ("ipc", "inproc") or insecure:
        return
    try:
        local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        local = False
    if not local:
        raise ConfigError(f"{key} = {endpoint!r} is reached from other machines: write `insecure = true` to allow it")


class Publisher:
    """Binds at once, so that subscribers are connected before the first verdict."""

    def __init__(self, context: zmq.asyncio.Context, settings: PublishSettings, station: str) -> None:
        require_loopback("publish.endpoint", settings.endpoint, settings.insecure)
        self._station = station
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, settings.high_water_mark)
        self._socket.setsockopt(zmq.LINGER, 2000)
        try:
            self._socket.bind(settings.endpoint)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ConfigError(f"publish.endpoint: {settings.endpoint} cannot be bound: {error}") from error

    async def verdict(self, header: wire.Header) -> None:
        """One verdict, exactly as journalled."""
        await self._socket.send_multipart([wire.verdict_topic(self._station, header["camera"]), wire.pack(header)])

    async def mask(self, verdict: wire.Header, shape: tuple[int, int], encoding: str, payload: bytes) -> None:
        """The mask that belongs to a verdict."""
        header = {
            "schema": wire.MASK_SCHEMA,
            **{key: verdict[key] for key in ("seq", "station", "camera", "frame_id")},
            "shape": list(shape),
            "encoding": encoding,
        }
        topic = wire.mask_topic(self._station, verdict["camera"])
        await self._socket.send_multipart([topic, wire.pack(header), payload])

    async def status(self, status: wire.Header) -> None:
        """The station's status."""
        await self._socket.send_multipart([wire.status_topic(self._station), wire.pack(status)])

    def close(self) -> None:
        """Send what is queued, for two seconds at most."""
        self._socket.close()
