"""The operators' preview: page, video, live values, health and metrics on one HTTP port. Read-only."""

import asyncio
import contextlib
import hashlib
import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import structlog
from aiohttp import web

from flawline.agent import ice, shot
from flawline.agent.addresses import page_misses
from flawline.agent.allowance import Allowance
from flawline.agent.board import Board
from flawline.agent.document import compose
from flawline.agent.encode import Stream
from flawline.agent.fail import Fail
from flawline.agent.guard import Guard
from flawline.agent.metrics import Metrics
from flawline.agent.observer import JudgedFrame
from flawline.agent.page_connections import PageConnections, server_log
from flawline.agent.shot import Shot
from flawline.agent.whep import OfferRefused, Session, Sessions
from flawline.agent.wire import Header
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.settings_preview import PreviewSettings

log = structlog.get_logger()
_EVENT_S = 0.1  # live values at most so often
_STATUS_S = 0.5  # and at least so often: a page that hears nothing for two seconds says so
_DRAIN_S = 0.01  # a slow reader is looked at so often
_WRITE_S = 5.0  # a page or player that takes no data for so long is let go
_OFFER_S = 5.0  # an offer is there as a whole by then
_UNWATCHED_PER_S = 1.0  # who comes to an idle line sees the last part, not an old one
_BURST = 3.0  # pictures copied at once above the rate, so that the last of a few parts in a row is shown
_COPIES = 2  # slots of a camera that the preview may hold at once; a failed part may take one more
_PACKS = 4  # failed parts that may wait to be packed
_SEND_BUFFER = 32 * 1024  # bytes, which Linux doubles: what lies in it is as old as the reader is slow
_BOUNDARY = "flawline-frame"


class Preview:
    """An observer that serves HTTP. `start` binds, `run` encodes until cancelled, `close` ends every connection."""

    def __init__(
        self,
        settings: PreviewSettings,
        station: str,
        cameras: list[str],
        status: Callable[[], Header],
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._station = station
        self._status = status
        self._metrics = metrics
        self._guard = Guard(settings)
        self.board = Board(settings, cameras)
        self._document, self._policy = compose()
        self._version = hashlib.sha256(self._document).hexdigest()[:12]  # by it a page knows that it is an old one
        self._threads = ThreadPoolExecutor(1, "preview")
        self._copier = ThreadPoolExecutor(1, "preview-copy")
        self._packer = ThreadPoolExecutor(1, "preview-pack")  # takes long: no slot is held for it
        self._copying: Counter[str] = Counter()
        self._packing = 0
        self._plain = {name: Stream(name, settings, self._threads, metrics.encoded, burn=False) for name in cameras}
        self._burnt = {name: Stream(name, settings, self._threads, metrics.encoded, burn=True) for name in cameras}
        self.sessions = Sessions(settings.codec, settings.max_viewers)
        self._copies = {name: Allowance(_BURST) for name in cameras}
        self._seats = settings.max_viewers
        self._pages = settings.max_pages
        metrics.viewers.set_function(lambda: settings.max_viewers - self._seats)
        self._closing = asyncio.Event()
        self._connections = PageConnections(settings.max_pages + settings.max_viewers)
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None

    # -- the line's side --------------------------------------------------------------------------------------

    def judged(self, frame: JudgedFrame) -> None:
        """Note the verdict. Have a picture copied that is to be shown or kept: on a thread, while the slot is held.

        As often as the video shows one, or rarely where nobody watches. A picture whose turn comes before the last
        ones are copied is left out: the line's slots are not for the preview to fill. What is copied to be kept is
        shown as well, so that a line which stops on a failed part shows that one.

        What the line did with the part counts, not what was found too late: no late result is shown or kept, and no
        refined one that says otherwise than the verdict. A refined picture does not take the place of a newer part's.
        """
        header, camera = frame.header, frame.header["camera"]
        if frame.kind == "verdict":
            self.board.note(header)
        if frame.picture is None or frame.kind == "late" or self._copying[camera] > _COPIES:
            return
        if frame.kind == "refined" and not self.board.agrees(header):
            return
        newest = self.board.is_newest(header)
        streams = self._plain[camera], self._burnt[camera]
        rate = self._settings.fps if any(stream.watched for stream in streams) else _UNWATCHED_PER_S
        show = newest and self._copying[camera] < _COPIES and self._copies[camera].take(rate)
        keep = self._packing < _PACKS and self.board.wants(header)
        if not show and not keep:
            return
        release = frame.hold()
        self._copying[camera] += 1
        self._packing += keep
        arrays = (frame.picture, frame.mask, frame.anomaly_map)
        work = partial(shot.take, header, *arrays, frame.points, self._settings.long_side)
        copy = asyncio.get_running_loop().run_in_executor(self._copier, work)

        def done(copied: asyncio.Future[Shot]) -> None:
            release()
            self._copying[camera] -= 1
            if copied.cancelled() or copied.exception() is not None:
                self._packing -= keep
            if copied.cancelled():
                return
            if keep:
                packed = asyncio.get_running_loop().run_in_executor(self._packer, Fail.of, copied.result())
                packed.add_done_callback(self._keep)
            if newest:
                for stream in streams:
                    stream.show(copied.result())

        copy.add_done_callback(done)

    def _keep(self, packed: asyncio.Future[Fail]) -> None:
        self._packing -= 1
        if not packed.cancelled():
            self.board.keep(packed.result())

    # -- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind. Raises ConfigError naming preview.host and preview.port; FlawlineError where the host was there and
        has gone again."""
        ice.use_settings(self._settings)
        app = web.Application(
            middlewares=[self._connections.middleware, self._guard.middleware], client_max_size=64 * 1024
        )
        app.add_routes(
            [
                web.get("/{camera}/mjpeg", self._mjpeg, allow_head=False),
                web.get("/", self._page),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._serve_metrics),
                web.get("/events", self._events, allow_head=False),
                web.get(r"/fails/{seq:[0-9]{1,19}}", self._fail),
                web.get(r"/fails/{seq:[0-9]{1,19}}/{file}", self._fail_file),
                web.post("/{camera}/whep", self._whep),
                web.options("/{camera}/whep", self._whep_options),
                web.delete("/{camera}/whep/{session}", self._whep_delete),
                web.options("/{camera}/whep/{session}", self._whep_options),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, logger=server_log(), shutdown_timeout=1.0, handler_cancellation=True
        )
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        host, port = self._settings.host, self._settings.port
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                partial(self._connections.protocol, server), host, port
            )
        except OSError as error:
            await self.close()
            kind = ConfigError if await page_misses(host) is None else FlawlineError
            raise kind(
                f"preview.host, preview.port: http://{host}:{port} cannot be bound: {error.strerror or error}"
            ) from error
        log.info("preview", address=f"http://{host}:{port}/")

    async def run(self) -> None:
        """Until cancelled: encode what is watched, let go who vanished. What fails here must not end the line."""
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for stream in (*self._plain.values(), *self._burnt.values()):
                        tasks.create_task(stream.run())
                    tasks.create_task(self.sessions.run())
            except* Exception:
                log.exception("preview_failed")
            await asyncio.sleep(1.0)

    async def close(self) -> None:
        """End every connection and free the port."""
        self._closing.set()
        if self._listener is not None:
            self._listener.close()
        await self.sessions.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self._copier.shutdown()
        self._packer.shutdown()
        self._threads.shutdown()

    # -- page, health, metrics --------------------------------------------------------------------------------

    async def _page(self, _: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": self._policy}
        return web.Response(body=self._document, content_type="text/html", charset="utf-8", headers=headers)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        status = self._status()
        checks = {
            "models": bool(status["worker"]["ready"]),
            "worker": bool(status["worker"]["healthy"]),
            "cameras": all(camera["up"] or camera["state"] == "ended" for camera in status["cameras"].values()),
            "progress": not status["no_progress"],
            "running": status["state"] not in ("starting", "stopping"),  # a full disk is no reason: verdicts go on
        }
        ready = all(checks.values())
        return web.json_response({"ready": ready, **checks}, status=200 if ready else 503)

    async def _serve_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    # -- live values ------------------------------------------------------------------------------------------

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events. Each page is sent what is new since it was last written to, so nothing queues up."""
        if self._pages <= 0:
            return self._full("preview.max_pages")
        self._pages -= 1
        try:
            response = await self._begin_stream(request, "text/event-stream")
            number, told_at = 0, 0.0
            while not self._closing.is_set():
                news = self.board.since_event(number)
                now = time.monotonic()
                if news or now - told_at >= _STATUS_S:
                    event: dict[str, Any] = {"t": time.time_ns(), "verdicts": news}
                    if now - told_at >= _STATUS_S:
                        event |= {"station": self._station, "page": self._version, "status": self._status()}
                        event |= self.board.summary()
                        told_at = now
                    number = news[-1]["n"] if news else number
                    await self._write(
                        request, response, b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
                    )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_EVENT_S):
                        await self._closing.wait()
            return response
        finally:
            self._pages += 1

    # -- failed parts -----------------------------------------------------------------------------------------

    async def _fail(self, request: web.Request) -> web.Response:
        fail = self.board.fails.get(int(request.match_info["seq"]))
        if fail is None:
            raise web.HTTPNotFound
        return web.json_response({"verdict": fail.header, "drawing": json.loads(fail.drawing)})

    async def _fail_file(self, request: web.Request) -> web.Response:
        fail = self.board.fails.get(int(request.match_info["seq"]))
        name = request.match_info["file"]
        body = None
        if fail is not None:
            body = await asyncio.get_running_loop().run_in_executor(self._threads, fail.file, name)
        if body is None:
            raise web.HTTPNotFound
        kind = "image/jpeg" if name.endswith(".jpg") else "image/png"
        return web.Response(body=body, content_type=kind)

    # -- video ------------------------------------------------------------------------------------------------

    def _stream(self, request: web.Request) -> Stream:
        streams = self._burnt if request.query.get("burn", "0") not in ("", "0") else self._plain
        stream = streams.get(request.match_info["camera"])
        if stream is None:
            raise web.HTTPNotFound(reason="there is no such camera")
        return stream

    async def _whep(self, request: web.Request) -> web.Response:
        stream, camera = self._stream(request), request.match_info["camera"]
        if request.content_type != "application/sdp":
            return web.Response(status=415, text="send an SDP offer as application/sdp\n")
        try:  # before it gets a seat: an offer that never comes whole keeps nobody from watching
            async with asyncio.timeout(_OFFER_S):
                offer = (await request.read()).decode()
        except TimeoutError:
            return web.Response(status=408, text=f"the offer did not come within {_OFFER_S:g} s\n")
        except UnicodeDecodeError:
            return web.Response(status=400, text="the offer is not UTF-8\n")
        if self._seats <= 0:
            return self._full("preview.max_viewers")
        self._seats -= 1
        try:
            session, answer = await self.sessions.begin(camera, stream, offer)
        except OfferRefused as error:
            self._seats += 1
            again = {"Retry-After": "2"} if error.status == 429 else {}
            return web.Response(status=error.status, text=f"{error}\n", headers=again)
        except BaseException:
            self._seats += 1
            raise
        session.at_end(self._give_seat)
        headers = {"Location": f"/{camera}/whep/{session.id}"}
        return web.Response(status=201, text=answer, content_type="application/sdp", headers=headers)

    async def _whep_delete(self, request: web.Request) -> web.Response:
        session: Session | None = self.sessions.get(request.match_info["camera"], request.match_info["session"])
        if session is None:
            raise web.HTTPNotFound
        await self.sessions.end(session)
        return web.Response()

    async def _whep_options(self, request: web.Request) -> web.Response:
        headers = {
            "Accept-Post": "application/sdp",
            "Allow": "POST, DELETE, OPTIONS",
        }
        if self._guard.cors(request):
            headers |= {
                "Access-Control-Allow-Methods": "POST, DELETE, OPTIONS",
                "Access-Control-Allow-Headers": "Authorization, Content-Type",
                "Access-Control-Max-Age": "600",
            }
        return web.Response(status=204, headers=headers)

    async def _mjpeg(self, request: web.Request) -> web.StreamResponse:
        stream = self._stream(request)
        if self._seats <= 0:
            return self._full("preview.max_viewers")
        self._seats -= 1
        try:
            response = await self._begin_stream(request, f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
            while not self._closing.is_set():
                try:
                    async with asyncio.timeout(1.0):
                        picture = await stream.next_jpeg()
                except TimeoutError:
                    continue
                head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                await self._write(request, response, head.encode() + picture + b"\r\n")
            return response
        finally:
            self._give_seat()

    def _give_seat(self) -> None:
        self._seats += 1

    def _full(self, key: str) -> web.Response:
        return web.Response(status=503, text=f"{key} are watching already\n", headers={"Retry-After": "10"})

    async def _begin_stream(self, request: web.Request, kind: str) -> web.StreamResponse:
        """Its head is sent. The kernel keeps little of what follows: it would keep megabytes, all shown as live."""
        response = web.StreamResponse(headers={"Content-Type": kind, "X-Accel-Buffering": "no"})
        self._guard.protect(request, response)
        await response.prepare(request)
        if request.transport is not None:
            with contextlib.suppress(OSError):  # the reader has gone meanwhile
                request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Write, and wait until the kernel has it, so that the next thing sent is a new one; but only so long.

        `write` alone comes back while up to 64 KiB wait.
        """
        try:
            async with asyncio.timeout(_WRITE_S):
                await response.write(data)
                for _ in range(int(2 * _WRITE_S / _DRAIN_S)):
                    if request.transport is None or not request.transport.get_write_buffer_size():
                        break
                    await asyncio.sleep(_DRAIN_S)
        except TimeoutError as error:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the reader takes no data") from error
