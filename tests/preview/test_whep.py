"""Video by WHEP with aiortc as the player: what any player would do, seen from outside."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiortc import RTCCertificate, RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from preview_line import BIT, CORNER, EDGE, HEIGHT, PICTURES, WIDTH, Agent

from flawline.agent import whep

SDP = {"Content-Type": "application/sdp"}


async def offer(kind: str = "video", codec: str | None = None) -> tuple[RTCPeerConnection, Any]:
    """A player that has made its offer, with a data channel for drawings."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    transceiver = peer.addTransceiver(kind, direction="recvonly")
    if codec is not None:
        known = RTCRtpReceiver.getCapabilities(kind).codecs
        transceiver.setCodecPreferences([one for one in known if one.mimeType == codec])
    channel = peer.createDataChannel("overlay", ordered=False, maxRetransmits=0)
    await peer.setLocalDescription(await peer.createOffer())
    return peer, channel


class Player:
    """A player at work: `frame` is its next picture, `drawings` what came beside it, `session` its address."""

    def __init__(self, peer: RTCPeerConnection, session: str, answer: str, drawings: list[dict[str, Any]]) -> None:
        self.peer, self.session, self.answer, self.drawings = peer, session, answer, drawings

    async def frame(self) -> tuple[int, np.ndarray]:
        """(RTP time stamp, (h, w, 3) RGB)."""
        track = self.peer.getReceivers()[0].track
        frame = await asyncio.wait_for(track.recv(), 20)
        return frame.pts, frame.to_ndarray(format="rgb24")


@asynccontextmanager
async def player(agent: Agent, query: str = "") -> AsyncIterator[Player]:
    peer, channel = await offer()
    drawings: list[dict[str, Any]] = []
    channel.on("message", lambda text: drawings.append(json.loads(text)))
    async with aiohttp.ClientSession(agent.url) as http:
        answer = await http.post(f"/top/whep{query}", data=peer.localDescription.sdp, headers=SDP)
        text = await answer.text()
        assert answer.status == 201, text
        assert answer.content_type == "application/sdp"
        session = answer.headers["Location"]
        await peer.setRemoteDescription(RTCSessionDescription(text, "answer"))
        try:
            yield Player(peer, session, text, drawings)
        finally:
            await http.delete(session)
            await peer.close()


def number_in(picture: np.ndarray) -> int:
    """The number that is written along the lower edge of the test's pictures."""
    scale = picture.shape[1] / WIDTH
    row = round((HEIGHT - BIT / 2) * scale)
    return sum(int(picture[row, round((bit + 0.5) * BIT * scale)].mean() > 128) << bit for bit in range(5))


async def test_plays_with_drawings_that_belong_to_the_frames(agent: Agent) -> None:
    async with player(agent) as watching:
        frames = [await watching.frame() for _ in range(15)]
        await asyncio.sleep(0.5)
    assert len({number_in(picture) for _, picture in frames}) > 5
    x, y = CORNER
    for _, picture in frames:
        assert picture.shape == (HEIGHT, WIDTH, 3)
        assert picture[y + EDGE // 2, x + EDGE // 2].min() > 220
        assert picture[y - 12, x - 12].max() < 180
    by_number = {drawing["frame_id"] % PICTURES: drawing for drawing in watching.drawings}
    offsets = {(stamp - by_number[number_in(picture)]["ts"]) % 2**32 for stamp, picture in frames[:-1]}
    assert len(offsets) == 1, "time stamps of drawings and frames differ by one offset"
    for drawing in watching.drawings:
        assert drawing["result"] == "fail"
        assert drawing["boxes"] == [[*CORNER, EDGE, EDGE, 1.0]]
        corners = np.array(drawing["outlines"][0]).reshape(-1, 2)
        assert abs(corners.min(0) - CORNER).max() <= 1
        assert abs(corners.max(0) - np.array(CORNER) - EDGE + 1).max() <= 1


async def test_the_answer_offers_this_address_only_and_asks_no_server(agent: Agent) -> None:
    async with player(agent) as watching:
        candidates = re.findall(r"a=candidate:\S+ \d udp \d+ (\S+) \d+ typ (\S+)", watching.answer)
        assert set(candidates) == {("127.0.0.1", "host")}


def rsa_certificate() -> RTCCertificate:
    """What GStreamer's players show, where aiortc's and browsers' have an elliptic key."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "player")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    return RTCCertificate(key, built.sign(key, hashes.SHA256()))


async def test_plays_for_a_player_with_an_rsa_certificate(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RTCCertificate, "generateCertificate", rsa_certificate)
    async with player(agent) as watching:
        _, picture = await watching.frame()
    assert picture.shape == (HEIGHT, WIDTH, 3)


async def test_delete_ends_a_session_once(agent: Agent) -> None:
    async with player(agent) as watching, aiohttp.ClientSession(agent.url) as http:
        await watching.frame()
        assert (await http.delete(watching.session)).status == 200
        assert (await http.delete(watching.session)).status == 404
        assert agent.metric("flawline_preview_viewers") == 0
        closed = asyncio.Event()
        watching.peer.on("connectionstatechange", lambda: watching.peer.connectionState == "closed" and closed.set())
        if watching.peer.connectionState != "closed":
            await asyncio.wait_for(closed.wait(), 20)


@pytest.mark.parametrize(
    ("body", "content_type", "camera", "status"),
    [
        ("v=0\r\n", "application/sdp", "top", 400),
        ("\x00\xff nonsense", "application/sdp", "top", 400),
        ("", "application/sdp", "top", 400),
        ("{}", "application/json", "top", 415),
        ("v=0\r\n", "application/sdp", "other", 404),
        ("x" * 100_000, "application/sdp", "top", 413),
        ("x" * 20_000, "application/sdp", "top", 413),
        ("v=0\r\n" + "m=video 9 UDP/TLS/RTP/SAVPF 96\r\n" * 5, "application/sdp", "top", 400),
        (b"\xff\xfe\xfd", "application/sdp", "top", 400),
        (b"abc", "application/sdp; charset=foo", "top", 400),
    ],
)
async def test_what_is_no_offer_is_refused(
    agent: Agent, body: str | bytes, content_type: str, camera: str, status: int
) -> None:
    sent = body.encode() if isinstance(body, str) else body
    async with aiohttp.ClientSession(agent.url) as http:
        answer = await http.post(f"/{camera}/whep", data=sent, headers={"Content-Type": content_type})
        assert answer.status == status
    assert agent.metric("flawline_preview_viewers") == 0


async def test_offers_without_our_video_are_refused(agent: Agent) -> None:
    async with aiohttp.ClientSession(agent.url) as http:
        for kind, codec, status in (("audio", None, 400), ("video", "video/H264", 406)):
            peer, _ = await offer(kind, codec)
            answer = await http.post("/top/whep", data=peer.localDescription.sdp, headers=SDP)
            assert answer.status == status
            await peer.close()
    assert agent.metric("flawline_preview_viewers") == 0


async def test_pages_of_other_origins_may_watch(agent: Agent) -> None:
    async with aiohttp.ClientSession(agent.url) as http:
        asked = await http.options("/top/whep", headers={"Origin": "http://player.example"})
        assert asked.status == 204
        assert asked.headers["Access-Control-Allow-Origin"] == "*"
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        assert "Location" in asked.headers["Access-Control-Expose-Headers"]
        assert asked.headers["Accept-Post"] == "application/sdp"
        assert (await http.get("/top/whep")).status == 405


async def test_origins_may_be_named(start: Callable[..., Agent]) -> None:
    agent = start('preview.allow_origins=["http://player.example"]').wait_ready()
    async with aiohttp.ClientSession(agent.url) as http:
        for origin, allowed in (("http://player.example", "http://player.example"), ("http://other.example", None)):
            asked = await http.options("/top/whep", headers={"Origin": origin})
            assert asked.status == 204
            assert asked.headers.get("Access-Control-Allow-Origin") == allowed
            assert asked.headers["Accept-Post"] == "application/sdp"


async def test_encoded_once_for_all_viewers(agent: Agent) -> None:
    async def encoded_in_three_seconds() -> float:
        before = agent.metric("flawline_preview_frames_encoded_total")
        await asyncio.sleep(3)
        return agent.metric("flawline_preview_frames_encoded_total") - before

    async with player(agent) as first:
        await first.frame()
        alone = await encoded_in_three_seconds()
        async with player(agent) as second, player(agent) as third, player(agent) as fourth:
            for one in (second, third, fourth):
                await one.frame()
            assert agent.metric("flawline_preview_viewers") == 4
            together = await encoded_in_three_seconds()
            numbers = [number_in((await one.frame())[1]) for one in (first, second, third, fourth)]
    assert len(numbers) == 4
    assert 5 < together < 1.5 * alone + 5
    assert agent.metric("flawline_preview_viewers") == 0


async def test_no_picture_is_encoded_for_nobody(agent: Agent) -> None:
    before = agent.metric("flawline_preview_frames_encoded_total")
    await asyncio.sleep(1.5)
    assert agent.metric("flawline_preview_frames_encoded_total") == before


async def test_the_burnt_in_overlay_shows_the_result(agent: Agent) -> None:
    async with player(agent, "?burn=1") as watching:
        _, picture = await watching.frame()
        for _ in range(3):
            _, picture = await watching.frame()
    red, green, blue = picture[4, WIDTH - 20].astype(int)
    assert red > 150 > green > blue


async def test_h264_and_fixed_ports_and_a_limit(start: Callable[..., Agent]) -> None:
    agent = start("preview.codec=h264", "preview.max_viewers=1", "preview.udp_ports=[41200, 41230]").wait_ready()
    async with player(agent) as watching, aiohttp.ClientSession(agent.url) as http:
        assert "H264/90000" in watching.answer
        for _ in range(5):
            _, picture = await watching.frame()
        assert picture[CORNER[1] + EDGE // 2, CORNER[0] + EDGE // 2].min() > 220
        ports = [int(port) for port in re.findall(r"a=candidate:.* 127\.0\.0\.1 (\d+) typ host", watching.answer)]
        assert ports
        assert all(41200 <= port <= 41230 for port in ports)
        peer, _ = await offer()
        refused = await http.post("/top/whep", data=peer.localDescription.sdp, headers=SDP)
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0
        await peer.close()
    async with player(agent) as again:
        await again.frame()


async def test_offers_do_not_stop_the_event_loop(start: Callable[..., Agent]) -> None:
    """As many sections as fit into a request, again and again: refused ones count, too."""
    agent = start("preview.max_viewers=2").wait_ready()
    section = (
        "m=video 9 UDP/TLS/RTP/SAVPF 96\r\na=inactive\r\na=mid:{}\r\na=ice-ufrag:abcd\r\na=ice-pwd:" + "x" * 24 + "\r\n"
        f"a=fingerprint:sha-256 {':'.join(['AB'] * 32)}\r\na=setup:actpass\r\na=rtcp-mux\r\na=rtpmap:96 VP8/90000\r\n"
    )
    head = "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n"
    statuses: list[int] = []
    async with aiohttp.ClientSession(agent.url) as http:
        for sections in (230, *[4] * 8):
            body = head + "".join(section.format(number) for number in range(sections))
            answer = await http.post("/top/whep", data=body, headers=SDP)
            statuses.append(answer.status)
    assert statuses[0] == 413
    assert statuses[1:3] == [400, 400]
    assert 429 in statuses[3:]
    assert agent.metric("flawline_preview_viewers") == 0
    await asyncio.sleep(1.0)
    async with player(agent) as watching:
        await watching.frame()


async def test_offers_that_never_come_whole_take_nobodys_seat(start: Callable[..., Agent]) -> None:
    agent = start("preview.max_viewers=2").wait_ready()
    host, port = "127.0.0.1", agent.port
    head = b"POST /top/whep HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/sdp\r\n"
    head += b"Content-Length: 6000\r\n\r\nv=0"
    open_ones = [await asyncio.open_connection(host, port) for _ in range(6)]
    for _, writer in open_ones:
        writer.write(head)
    await asyncio.sleep(0.5)
    async with player(agent) as watching:
        await watching.frame()
        assert agent.metric("flawline_preview_viewers") == 1
    for reader, writer in open_ones:
        answer = await asyncio.wait_for(reader.readline(), 20)
        assert b" 408 " in answer
        writer.close()


PLAYER_THAT_VANISHES = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from test_whep import player
async def main():
    class Agent: url = sys.argv[1]
    async with player(Agent) as watching:
        await watching.frame()
        print("plays", flush=True)
        while True:
            await watching.frame()
asyncio.run(main())
"""


class Reports:
    """What aiortc says of a viewer: its last report, stamped by the wall clock."""

    connectionState = "connected"

    def __init__(self) -> None:
        self.at = datetime(2030, 1, 1, tzinfo=UTC)

    def on(self, *_: Any) -> None:
        """Nobody opens a channel."""

    async def getStats(self) -> dict[str, Any]:
        return {"": SimpleNamespace(type="remote-inbound-rtp", timestamp=self.at)}


async def test_a_clock_that_is_set_neither_ends_a_session_nor_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(whep, "time", SimpleNamespace(monotonic=lambda: now[0]))
    reports: Any = Reports()
    nothing: Any = None
    session = whep.Session("top", nothing, reports, nothing)
    assert not await session.vanished(), "it has just been heard, whatever year its report says"
    now[0] += whep._SILENCE_S - 1
    reports.at -= timedelta(hours=1)  # put back, and another report
    assert not await session.vanished()
    now[0] += whep._SILENCE_S + 1
    assert await session.vanished()


def test_a_viewer_that_vanishes_is_let_go(agent: Agent) -> None:
    here = __file__.rsplit("/", 1)[0]
    command = [sys.executable, "-c", PLAYER_THAT_VANISHES, agent.url, here]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        assert viewer.stdout.readline() == "plays\n"
        assert agent.metric("flawline_preview_viewers") == 1
        viewer.kill()
    deadline = time.monotonic() + 40
    while agent.metric("flawline_preview_viewers") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert agent.metric("flawline_preview_viewers") == 0
