"""Connections to the page that ask nothing, or too many of them: over TCP, from outside."""

import contextlib
import os
import socket
import time
import urllib.error
from collections.abc import Callable, Iterator

import pytest
from preview_line import Agent

from flawline.agent.control import ask


@pytest.fixture
def small(start: Callable[..., Agent]) -> Agent:
    """One address may open 36 connections, all together 72."""
    return start("preview.max_viewers=2", "preview.max_pages=2").wait_ready()


def connect(agent: Agent, count: int, source: str = "127.0.0.1") -> list[socket.socket]:
    return [
        socket.create_connection(("127.0.0.1", agent.port), timeout=20, source_address=(source, 0))
        for _ in range(count)
    ]


def still_open(connections: list[socket.socket]) -> int:
    count = 0
    for one in connections:
        one.settimeout(0.0)
        try:
            count += one.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            count += 1
        except ConnectionError:
            pass
    return count


@contextlib.contextmanager
def closed_at_the_end() -> Iterator[list[socket.socket]]:
    connections: list[socket.socket] = []
    try:
        yield connections
    finally:
        for one in connections:
            one.close()


def test_one_address_cannot_take_all_connections_and_all_have_a_limit(small: Agent) -> None:
    assert small.process is not None
    files = f"/proc/{small.process.pid}/fd"
    before = len(os.listdir(files))
    with closed_at_the_end() as held:
        held += connect(small, 120)
        time.sleep(1.0)
        assert 30 <= still_open(held) <= 36
        held += connect(small, 120, "127.0.0.2") + connect(small, 120, "127.0.0.3")
        time.sleep(1.0)
        assert 60 <= still_open(held) <= 72
        assert len(os.listdir(files)) - before <= 80, "the line needs the others"
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            small.get("/healthz")
        assert ask(small.control, {"cmd": "status", "id": 1}, timeout_s=20)["state"] == "running"
    assert small.get("/healthz")[0] == 200
    assert "page_connections_full" in small.log()


def test_a_connection_without_a_whole_request_is_closed(small: Agent) -> None:
    with closed_at_the_end() as held:
        held += connect(small, 2)
        (kept,) = connect(small, 1)
        held.append(kept)
        began = time.monotonic()
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
        while still_open(held[:2]) and time.monotonic() < began + 30:
            with contextlib.suppress(ConnectionError):
                held[1].settimeout(1.0)
                held[1].sendall(b"GET / HTTP/1.1\r\nX: " if time.monotonic() < began + 1 else b"x")  # never whole
            time.sleep(0.3)
        assert 9 < time.monotonic() - began < 20
        kept.settimeout(20)
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200"), "one that has asked may ask again"


def test_a_page_that_stays_open_is_not_cut(small: Agent) -> None:
    with closed_at_the_end() as held:
        held += connect(small, 1)
        held[0].sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        end, last = time.monotonic() + 13, b""
        while time.monotonic() < end:
            last = held[0].recv(65536)
            assert last
        assert b"data: " in last
