"""A small HTTP server on 127.0.0.1 that can misbehave in the ways that servers and lines do."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """How the files are served. `cuts`: break off after so many bytes, one entry an answer, then no more."""

    files: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    etag: str | None = '"one"'
    chunk: int = 1 << 16
    pause_s: float = 0.0
    say_length: bool = True
    lengthen: int = 0  # added to the length that is announced, and never sent
    fail_first: list[int] = field(default_factory=list)  # status codes of the first answers
    silent: bool = False  # accept, then say nothing
    asked: list[str | None] = field(default_factory=list)  # the Range header of every request
    sent: int = 0


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """Serves until the block ends; gives the address."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            behaviour.asked.append(self.headers.get("Range"))
            if behaviour.silent:
                over.wait(30.0)
                return
            if behaviour.fail_first:
                self.send_response(behaviour.fail_first.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = behaviour.files.get(self.path.lstrip("/"))
            if data is None:
                self.send_error(404)
                return
            start = self._start()
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if behaviour.say_length:
                self.send_header("Content-Length", str(len(data) - start + behaviour.lengthen))
            if behaviour.etag:
                self.send_header("ETag", behaviour.etag)
            self.send_header("Connection", "close")
            self.close_connection = True
            self.end_headers()
            cut = behaviour.cuts.pop(0) if behaviour.cuts else len(data)
            for place in range(start, min(len(data), start + cut), behaviour.chunk):
                part = data[place : min(place + behaviour.chunk, start + cut)]
                try:
                    self.wfile.write(part)
                    self.wfile.flush()
                except OSError:
                    return
                behaviour.sent += len(part)
                time.sleep(behaviour.pause_s)

        def _start(self) -> int:
            wanted = self.headers.get("Range")
            if wanted is None or not behaviour.ranges or self.headers.get("If-Range") != behaviour.etag:
                return 0
            return int(wanted.removeprefix("bytes=").rstrip("-"))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join(10.0)
