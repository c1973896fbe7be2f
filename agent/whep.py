"""WHEP: one peer connection per viewer, given packets that are encoded already.

https://datatracker.ietf.org/doc/draft-ietf-wish-whep/: an offer is posted, the answer comes back with a
`Location`, whose DELETE ends the session. All candidates are in the answer; a player's own are not needed,
because it is the player that reaches out to us, so its trickled ones (PATCH) are not taken.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import av
import structlog
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError

from flawline.agent.allowance import Allowance
from flawline.agent.encode import Stream
from flawline.config.errors import FlawlineError

log = structlog.get_logger()
_CONNECT_S = 15.0  # a viewer that is not connected by then is let go
_SILENCE_S = 12.0  # a viewer whose receiver reports stay away for so long has vanished
_QUEUE = 12  # packets that may wait for one viewer's sender
_DRAWING_BYTES = 256 * 1024  # drawings that may wait for one viewer's data channel
_OFFER_BYTES = 16 * 1024  # of an offer without its candidates; a browser's has some 7000
_OFFER_MEDIA = 4  # of an offer: video, audio, data, and one more. aiortc's work, on the event loop, grows with them
_OFFERS_PER_S = 2.0  # each costs the event loop some 30 ms, refused or not


class OfferRefused(FlawlineError):
    """An offer that cannot be answered. `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class PacketTrack(MediaStreamTrack):  # type: ignore[misc]  # aiortc is not typed for mypy
    """A track of encoded packets, from a key frame on. Behind by too much, it goes on at the next key frame."""

    kind = "video"

    def __init__(self) -> None:
        super().__init__()
        self._packets: asyncio.Queue[av.Packet | None] = asyncio.Queue(_QUEUE + 1)
        self._in_step = False

    def put(self, packet: av.Packet) -> bool:
        """Without waiting. False where a key frame is needed before anything else can be sent."""
        if self._packets.qsize() >= _QUEUE:
            while not self._packets.empty():
                self._packets.get_nowait()
            self._in_step = False
        self._in_step = self._in_step or packet.is_keyframe
        if self._in_step:
            self._packets.put_nowait(packet)
        return self._in_step

    async def recv(self) -> av.Packet:
        """The next packet; called by aiortc's sender."""
        packet = await self._packets.get()
        if packet is None or self.readyState != "live":
            raise MediaStreamError
        return packet

    def stop(self) -> None:
        """Wake the sender up, so that it ends."""
        super().stop()
        if not self._packets.full():
            self._packets.put_nowait(None)


class Session:
    """One viewer: its peer connection, its track, and the channel its drawings go over."""

    def __init__(self, camera: str, stream: Stream, peer: RTCPeerConnection, track: PacketTrack) -> None:
        self.id = secrets.token_urlsafe(18)
        self.camera = camera
        self.peer = peer
        self.track = track
        self._began = time.monotonic()
        self._heard: datetime | None = None  # the viewer's last report
        self._heard_at = self._began
        self._channel: RTCDataChannel | None = None
        self._leave: Callable[[], None] = lambda: None
        self._then: Callable[[], None] = lambda: None
        self._stream = stream
        peer.on("datachannel", self._open)

    def _open(self, channel: RTCDataChannel) -> None:
        self._channel = channel

    def offer(self, packet: av.Packet, drawing: str) -> bool:
        """See `encode.Viewer`."""
        if self.peer.connectionState != "connected":
            return True
        channel = self._channel
        if drawing and channel is not None and channel.readyState == "open" and channel.bufferedAmount < _DRAWING_BYTES:
            channel.send(drawing)
        return self.track.put(packet)

    def watch(self) -> None:
        """Take packets from now on: it is connected."""
        self._began = time.monotonic()
        self._leave = self._stream.join(self)

    def at_end(self, then: Callable[[], None]) -> None:
        """Call this once when the session has ended."""
        self._then = then

    def leave(self) -> None:
        """Take no more packets."""
        self._leave()
        self._then()

    async def vanished(self) -> bool:
        """Whether the viewer did not connect in time, or sends no receiver reports any more."""
        age = time.monotonic() - self._began
        if self.peer.connectionState in ("failed", "closed"):
            return True
        if self.peer.connectionState != "connected":
            return age > _CONNECT_S
        heard = [
            report.timestamp for report in (await self.peer.getStats()).values() if report.type == "remote-inbound-rtp"
        ]
        if not heard:
            return age > _SILENCE_S
        now = time.monotonic()
        if max(heard) != self._heard:  # stamped by the wall clock, which may be set: only whether it changes counts
            self._heard, self._heard_at = max(heard), now
        return now - self._heard_at > _SILENCE_S


class Sessions:
    """All viewers by WHEP, and their end."""

    def __init__(self, codec: str, at_once: int) -> None:
        """`at_once`: viewers that may come together, as after a restart."""
        self._codec = codec
        self._offers = Allowance(at_once)
        self._answering = asyncio.Lock()  # one offer at a time: between two of them verdicts leave
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    async def begin(self, camera: str, stream: Stream, offer: str) -> tuple[Session, str]:
        """A session and the answer to its offer. Raises OfferRefused."""
        offer = _without_candidates(offer)
        if len(offer) > _OFFER_BYTES:
            raise OfferRefused(f"the offer is longer than {_OFFER_BYTES} characters", 413)
        if sum(line.startswith("m=") for line in offer.splitlines()) > _OFFER_MEDIA:
            raise OfferRefused(f"the offer has more than {_OFFER_MEDIA} media sections", 400)
        if not self._offers.take(_OFFERS_PER_S):
            raise OfferRefused("too many offers; try again", 429)
        async with self._answering:
            return await self._answer(camera, stream, offer)

    async def _answer(self, camera: str, stream: Stream, offer: str) -> tuple[Session, str]:
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        track = PacketTrack()
        session = Session(camera, stream, peer, track)
        try:
            sender: Any = peer.addTransceiver(track, direction="sendonly")
            sender.setCodecPreferences(_codecs(self._codec))
            sender.sender._send_keyframe = stream.want_key  # what aiortc calls on a receiver's PLI or FIR
            async with asyncio.timeout(_CONNECT_S):
                await peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
                if "a=setup:passive" not in offer:
                    _serve_dtls(peer, sender.sender)
                await peer.setLocalDescription(await peer.createAnswer())
            if sender.mid is None or sender.currentDirection != "sendonly":
                raise OfferRefused("the offer has no video that it wants to receive", 400)
        except (OfferRefused, asyncio.CancelledError):
            await peer.close()
            raise
        except Exception as error:  # aiortc's parser raises a zoo of them on a malformed offer
            await peer.close()
            if "Failed to set remote" in str(error):
                raise OfferRefused(f"the offer does not list {self._codec.upper()}, see preview.codec", 406) from error
            raise OfferRefused(f"the offer cannot be read: {type(error).__name__}: {error}", 400) from error
        self._sessions[session.id] = session

        def changed() -> None:
            log.debug("viewer", camera=camera, state=peer.connectionState)
            if peer.connectionState == "connected":
                session.watch()

        peer.on("connectionstatechange", changed)
        if peer.connectionState == "connected":
            session.watch()
        log.info("viewer_joins", camera=camera, viewers=len(self._sessions))
        return session, peer.localDescription.sdp

    def get(self, camera: str, session: str) -> Session | None:
        """The session of that name and camera."""
        found = self._sessions.get(session)
        return found if found is not None and found.camera == camera else None

    async def end(self, session: Session) -> None:
        """Close it; nothing happens where it is closed already."""
        if self._sessions.pop(session.id, None) is None:
            return
        session.leave()
        session.track.stop()
        try:
            async with asyncio.timeout(5):
                await session.peer.close()
        except TimeoutError:
            log.warning("viewer_does_not_close", camera=session.camera)
        log.info("viewer_left", camera=session.camera, viewers=len(self._sessions))

    async def run(self) -> None:
        """Until cancelled: end the sessions of viewers that vanished."""
        while True:
            await asyncio.sleep(1.0)
            for session in list(self._sessions.values()):
                if await session.vanished():
                    log.info("viewer_vanished", camera=session.camera, state=session.peer.connectionState)
                    await self.end(session)

    async def close(self) -> None:
        """End them all."""
        await asyncio.gather(*(self.end(session) for session in list(self._sessions.values())))


def _codecs(codec: str) -> list[Any]:
    mime = f"video/{codec}".lower()
    codecs = RTCRtpSender.getCapabilities("video").codecs
    return [known for known in codecs if known.mimeType.lower() in (mime, "video/rtx")]


def _serve_dtls(peer: RTCPeerConnection, sender: RTCRtpSender) -> None:
    """Take the server's side of DTLS, which an offer with `setup:actpass` leaves to us.

    aiortc takes the client's, and is then content with certificates of elliptic keys only; GStreamer's has an RSA key.
    """
    transports = {sender.transport} if peer.sctp is None else {sender.transport, peer.sctp.transport}
    for transport in transports:
        transport._set_role("server")


def _without_candidates(offer: str) -> str:
    """The offer without its candidates.

    They are not needed: the player sends its checks to ours, and is answered where they come from. They do harm
    where they are mDNS names, as browsers write them, which nobody resolves on many plant networks.
    """
    lines = offer.splitlines()  # as aiortc does
    kept = [f"{line}\r\n" for line in lines if not line.startswith(("a=candidate:", "a=end-of-candidates"))]
    return "".join(kept)
