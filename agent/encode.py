"""One encoder per camera for all viewers: the latest picture in, the same packet out to everybody.

aiortc encodes once per viewer when a track gives it frames; a track that gives it packets is sent as it is.
On that way aiortc does not answer a receiver's request for a key frame, so the stream makes one itself when a
viewer joins, when one asks or falls behind, and at intervals.
"""

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Protocol

import av
import cv2
import numpy as np
import structlog
from numpy.typing import NDArray
from prometheus_client import Counter

from flawline.agent.shot import Shot, burnt, jpeg, overlay, waiting
from flawline.config.settings_preview import PreviewSettings

log = structlog.get_logger()

CLOCK_RATE = 90_000
"""Ticks a second of a video's RTP time stamps (RFC 6184 section 5.1, RFC 7741 section 4.1)."""
TIME_BASE = Fraction(1, CLOCK_RATE)
KEY_INTERVAL_S = 5.0
REPEAT_S = 0.5
"""With nothing new the last picture is sent again after so long: a player that hears nothing calls itself broken."""

_OPTIONS = {
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "error-resilient": "1"}),
    "h264": ("libx264", {"preset": "ultrafast", "tune": "zerolatency"}),
}


class VideoEncoder:
    """Encodes pictures of one size. Not thread-safe: one thread at a time."""

    def __init__(self, codec: str, width: int, height: int, fps: float, bitrate_kbps: int) -> None:
        name, options = _OPTIONS[codec]
        self.size = (width, height)
        self._context = av.CodecContext.create(name, "w")
        self._context.width, self._context.height = width, height
        self._context.pix_fmt = "yuv420p"
        self._context.bit_rate = bitrate_kbps * 1000
        self._context.framerate = Fraction(fps).limit_denominator(1000)
        self._context.time_base = TIME_BASE
        self._context.gop_size = 1_000_000  # key frames come when they are asked for
        self._context.thread_count = 1
        self._context.options = options
        if codec == "h264":
            self._context.profile = "Baseline"

    def encode(self, picture: NDArray[np.uint8], timestamp: int, *, key: bool) -> list[av.Packet]:
        """(h, w, 3) RGB at `timestamp` in ticks of CLOCK_RATE."""
        frame = av.VideoFrame.from_ndarray(cv2.cvtColor(picture, cv2.COLOR_RGB2YUV_I420), format="yuv420p")
        frame.pts, frame.time_base = timestamp, TIME_BASE
        if key:
            frame.pict_type = av.video.frame.PictureType.I
        packets = []
        for packet in self._context.encode(frame):
            packet.pts, packet.time_base = timestamp, TIME_BASE
            packets.append(packet)
        return packets


class Viewer(Protocol):
    """Who gets the packets of a stream."""

    def offer(self, packet: av.Packet, drawing: str) -> bool:
        """Take one packet and what is drawn over it, without waiting. False: a key frame is needed to go on."""


class Stream:
    """One camera's video, plain or with the overlay burnt in. Idle, and free of cost, while nobody watches."""

    def __init__(
        self, camera: str, settings: PreviewSettings, threads: ThreadPoolExecutor, encoded: Counter, *, burn: bool
    ) -> None:
        self._camera = camera
        self._settings = settings
        self._threads = threads
        self._burn = burn
        self._fresh = asyncio.Event()
        self._latest: Shot | None = None
        self._encoder: VideoEncoder | None = None
        self._viewers: set[Viewer] = set()
        self._stills: set[asyncio.Future[bytes]] = set()
        self._key_wanted = True
        self._encoded = encoded.labels(camera)

    @property
    def watched(self) -> bool:
        """Whether anybody wants the pictures."""
        return bool(self._viewers or self._stills)

    def show(self, shot: Shot) -> None:
        """The newest picture; one that was not yet sent is replaced."""
        self._latest = shot
        self._fresh.set()

    def join(self, viewer: Viewer) -> Callable[[], None]:
        """Give the viewer every packet from the next key frame on, until the returned function is called."""
        self._viewers.add(viewer)
        self.want_key()
        self._fresh.set()
        return lambda: self._viewers.discard(viewer)

    def want_key(self) -> None:
        """Make the next frame a key frame."""
        self._key_wanted = True

    async def next_jpeg(self) -> bytes:
        """The next picture as a JPEG file, made once for everybody who waits for it."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._stills.add(future)
        try:
            return await future
        finally:
            self._stills.discard(future)

    async def run(self) -> None:
        """Until cancelled: wait for a picture, encode it on the thread, hand it out. A failure costs one picture."""
        loop = asyncio.get_running_loop()
        failing = False
        key_at = 0.0
        least = 1.0 / self._settings.fps
        while True:
            try:
                async with asyncio.timeout(REPEAT_S):
                    await self._fresh.wait()
            except TimeoutError:
                pass
            self._fresh.clear()
            shot, now = self._latest, time.monotonic()
            if not self.watched:
                continue
            key = self._key_wanted or now - key_at >= KEY_INTERVAL_S
            self._key_wanted = False
            viewers, stills = set(self._viewers), set(self._stills)
            # A time stamp is moved by up to two milliseconds: the distances between stamps are then unlike each other,
            # and a page finds the random offset that RTP adds by comparing them.
            timestamp = int(now * CLOCK_RATE) + random.randrange(CLOCK_RATE // 500)
            try:
                packets, drawing, still = await loop.run_in_executor(
                    self._threads, self._encode, shot, timestamp, key, bool(viewers), bool(stills)
                )
            except Exception:
                if not failing:
                    log.exception("preview_encoder_failed", camera=self._camera)
                failing, self._key_wanted, self._encoder = True, True, None
                await asyncio.sleep(REPEAT_S)
                continue
            failing = False
            for packet in packets:
                if packet.is_keyframe:
                    key_at = now
                for viewer in viewers & self._viewers:
                    self._hand(viewer, packet, drawing)
            for future in stills:
                if not future.done():
                    future.set_result(still)
            await asyncio.sleep(max(0.0, least * 0.9 - (time.monotonic() - now)))

    def _hand(self, viewer: Viewer, packet: av.Packet, drawing: str) -> None:
        """A viewer whose connection breaks just now costs only itself."""
        try:
            in_step = viewer.offer(packet, drawing)
        except Exception:
            log.exception("viewer_failed", camera=self._camera)
            self._viewers.discard(viewer)
        else:
            self._key_wanted |= not in_step

    def _encode(
        self, shot: Shot | None, timestamp: int, key: bool, video: bool, still: bool
    ) -> tuple[list[av.Packet], str, bytes]:
        """On the preview's thread."""
        picture = waiting(self._camera) if shot is None else burnt(shot) if self._burn else shot.picture
        packets: list[av.Packet] = []
        if video:
            height, width = picture.shape[:2]
            if self._encoder is None or self._encoder.size != (width, height):
                settings = self._settings
                self._encoder = VideoEncoder(settings.codec, width, height, settings.fps, settings.bitrate_kbps)
            packets = self._encoder.encode(picture, timestamp, key=key)
            self._encoded.inc()
        drawing = overlay(shot, timestamp) if video and shot is not None and not self._burn else ""
        return packets, drawing, jpeg(picture) if still else b""
