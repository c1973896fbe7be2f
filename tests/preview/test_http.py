"""Health, metrics, live values, failed parts and who may see them: over HTTP, from outside."""

import base64
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from preview_line import CORNER, EDGE, HEIGHT, WIDTH, Agent, events
from structlog.testing import capture_logs

from flawline.agent.control import ask
from flawline.agent.guard import Guard
from flawline.config.settings_preview import PreviewSettings

TOKEN = "a-token-of-more-than-16-characters"


def status(agent: Agent) -> dict:
    return ask(agent.control, {"cmd": "status", "id": 1}, timeout_s=30)


def test_counters_reconcile_with_the_verdicts(start: Callable[..., Agent], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        cv2.imwrite(str(tmp_path / "pictures" / f"{number}.png"), np.full((40, 60, 3), 90, np.uint8))
    (tmp_path / "pictures" / "3.png").write_bytes(b"broken")
    agent = start("cameras.top.loop=false").wait_ready()
    deadline = time.monotonic() + 30
    while status(agent)["last_seq"] < 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    text = agent.get("/metrics")[1].decode()
    assert agent.metric("flawline_triggers_total") == 8
    assert agent.metric("flawline_verdicts_total") == 8
    assert 'flawline_verdicts_total{reason="",result="fail"} 7.0' in text
    assert 'flawline_verdicts_total{reason="bad_frame",result="error"} 1.0' in text
    assert 'flawline_frames_dropped_total{reason="bad_frame",stage="camera"} 1.0' in text
    assert 'flawline_stage_duration_seconds_count{stage="queue"} 7.0' in text
    assert agent.metric("flawline_trigger_to_verdict_seconds_count") == 8
    assert 0 < agent.metric("flawline_trigger_to_verdict_seconds_sum") < 60
    assert abs(agent.metric("flawline_last_verdict_timestamp_seconds") - time.time()) < 60
    assert agent.metric("flawline_build_info") == 1
    assert agent.metric("flawline_deadline_missed_total") == 0
    assert agent.metric("flawline_journal_unwritten_verdicts") == 0
    while status(agent)["cameras"]["top"]["state"] != "ended" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert agent.get("/readyz")[0] == 200, "a folder that was read to its end is no fault"
    assert agent.metric("flawline_camera_up") == 1
    for name in ("flawline_queue_depth", "flawline_gpu_memory_bytes", "flawline_camera_up"):
        assert f"\n{name}" in text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert all(name.startswith("flawline_") for name in names), names


def test_ready_follows_the_worker(agent: Agent) -> None:
    assert agent.get("/healthz")[0] == 200
    before = agent.metric("flawline_worker_restarts_total")
    os.kill(status(agent)["worker"]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    seen = 200
    while seen == 200 and time.monotonic() < deadline:
        seen, body = agent.get("/readyz")
    assert seen == 503
    assert json.loads(body)["models"] is False
    assert agent.get("/healthz")[0] == 200
    agent.wait_ready()
    assert agent.metric("flawline_worker_restarts_total") == before + 1


def test_live_values_tell_every_verdict_in_order(agent: Agent) -> None:
    heard = events(agent, 2.5)
    seqs = [verdict["seq"] for event in heard for verdict in event["verdicts"]]
    assert seqs == list(range(seqs[0], seqs[-1] + 1))
    full = [event for event in heard if "status" in event]
    assert len(full) >= 3
    assert max(later["t"] - event["t"] for event, later in itertools.pairwise(heard)) < 1.5e9
    counts = full[-1]["counts"]
    assert counts["pass"] == 0
    assert counts["fail"] > 5
    assert full[-1]["per_camera"] == {"top": counts}
    assert full[-1]["station"] == "line1"


def test_failed_parts_are_shown_with_all_their_pictures(agent: Agent) -> None:
    fails = events(agent, 0.5)[0]["fails"]
    assert len(fails) > 1
    seq = fails[0]["seq"]
    told = json.loads(agent.get(f"/fails/{seq}")[1])
    assert told["verdict"]["seq"] == seq
    assert told["verdict"]["provenance"]["bundle"] == "noop"

    with urllib.request.urlopen(f"{agent.url}/fails/{seq}/picture.jpg", timeout=20) as answer:
        assert answer.headers["Cache-Control"] == "no-store", "another station's part has the same number"

    def picture(name: str) -> np.ndarray:
        code, body = agent.get(f"/fails/{seq}/{name}")
        assert code == 200
        return cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)

    x, y = CORNER
    mask = picture("mask.png")[:, :, 0]
    assert mask.shape == (HEIGHT, WIDTH)
    assert (mask > 0).sum() == EDGE * EDGE
    assert mask[y : y + EDGE, x : x + EDGE].min() == 255
    heat = picture("map.png")
    assert heat[y + 5, x + 5].sum() > heat[5, 5].sum() + 200
    assert picture("picture.jpg")[y + 5, x + 5].min() > 220
    assert np.abs(picture("marked.jpg").astype(int) - picture("picture.jpg")).max() > 100
    assert picture("thumb.jpg").shape[1] == 240
    for path in (
        f"/fails/{seq}/other.jpg",
        "/fails/0/picture.jpg",
        "/fails/0",
        "/fails/x",
        "/page.js",
        "/../preview.py",
    ):
        assert agent.get(path)[0] == 404


def test_mjpeg_is_a_series_of_pictures(agent: Agent) -> None:
    with urllib.request.urlopen(agent.url + "/top/mjpeg", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("multipart/x-mixed-replace")
        data = b""
        while data.count(b"\xff\xd9--") < 4 and data.count(b"--flawline-frame") < 5:
            data += answer.read1(65536)
    part = data.split(b"--flawline-frame\r\n")[2]
    head, body = part.split(b"\r\n\r\n", 1)
    assert b"image/jpeg" in head
    picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert picture[CORNER[1] + 5, CORNER[0] + 5].min() > 220
    deadline = time.monotonic() + 10
    while agent.metric("flawline_preview_viewers") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert agent.metric("flawline_preview_viewers") == 0


def test_every_answer_carries_the_security_headers(agent: Agent) -> None:
    for path in ("/", "/events", "/top/mjpeg", "/metrics", "/nothing"):
        request = urllib.request.Request(agent.url + path)
        try:
            answer = urllib.request.urlopen(request, timeout=20)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "aiohttp" not in answer.headers["Server"]


def test_the_page_is_one_file_and_its_policy_allows_that_file_alone(agent: Agent) -> None:
    with urllib.request.urlopen(agent.url, timeout=20) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    parts = re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
    assert [tag for tag, _ in parts] == ["style", "script", "script"]
    allowed = dict(directive.split(" ", 1) for directive in policy.split("; "))
    for tag in ("style", "script"):
        digests = [hashlib.sha256(text.encode()).digest() for kind, text in parts if kind == tag]
        wanted = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        assert allowed[f"{tag}-src"] == wanted, "these texts and nothing else"
    # Nothing names another file: no tag but the icon's, which carries its picture in itself.
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    for elsewhere in ("http://", "https://", "url(", "@import", "import("):
        assert elsewhere not in page


def test_a_name_that_was_made_to_point_here_is_not_served(agent: Agent) -> None:
    assert agent.get("/", {"Host": f"evil.example:{agent.port}"})[0] == 421
    assert agent.get("/", {"Host": f"localhost:{agent.port}"})[0] == 200


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def test_with_a_token_nothing_but_health_is_open(start: Callable[..., Agent], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    agent = start(f"preview.token_file={tmp_path / 'token'}", "preview.host=0.0.0.0").wait_ready()
    for path in ("/", "/events", "/metrics", "/top/mjpeg", "/fails/1"):
        assert agent.get(path)[0] == 401, path
        assert agent.get(path, {"Authorization": "Bearer wrong"})[0] == 401, path
    assert agent.get("/healthz")[0] == 200
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert agent.get("/metrics", bearer)[0] == 200
    assert events(agent, 0.5, bearer)
    assert agent.get("/?token=wrong")[0] == 401

    with pytest.raises(urllib.error.HTTPError) as redirect:
        urllib.request.build_opener(_Stay).open(f"{agent.url}/?token={TOKEN}", timeout=20)
    assert redirect.value.code == 303
    cookie = redirect.value.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie, "a link from a dashboard shows the page"
    assert TOKEN not in cookie
    shown = {"Cookie": cookie.split(";")[0]}
    assert agent.get("/", shown)[0] == 200
    with urllib.request.urlopen(urllib.request.Request(agent.url + "/events", headers=shown), timeout=20) as stream:
        assert stream.headers["Set-Cookie"] == cookie, "who watches is not asked again after 30 days"
    with urllib.request.urlopen(urllib.request.Request(agent.url + "/events", headers=bearer), timeout=20) as stream:
        assert stream.headers["Set-Cookie"] is None
    assert TOKEN not in agent.log()


def test_bytes_that_are_no_text_are_refused_without_a_traceback(start: Callable[..., Agent], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    agent = start(f"preview.token_file={tmp_path / 'token'}").wait_ready()
    with pytest.raises(urllib.error.HTTPError) as redirect:
        urllib.request.build_opener(_Stay).open(f"{agent.url}/?token={TOKEN}", timeout=20)
    name = redirect.value.headers["Set-Cookie"].partition("=")[0]
    known = f"Authorization: Bearer {TOKEN}\r\n".encode()

    def answer(line: bytes, headers: bytes = b"") -> bytes:
        with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as connection:
            connection.sendall(line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers + b"\r\n")
            return b"".join(iter(lambda: connection.recv(65536), b""))

    for line, headers, status in (
        (b"GET /metrics", b"Authorization: Bearer \xff\xfe\r\n", b" 401 "),
        (b"GET /metrics", f"Cookie: {name}=".encode() + b"\xff\r\n", b" 401 "),
        (b"GET /events", f"Cookie: {name}=".encode() + b"\xff\r\n", b" 401 "),
        (b"GET /?token=%ff%fe", b"", b" 401 "),
        (b"GET /?token=%ed%a0%80", b"", b" 401 "),
        (b"GET /fails/" + b"1" * 5000, known, b" 404 "),
        (b"GET /fails/" + b"1" * 5000 + b"/thumb.jpg", known, b" 404 "),
        (b"GET /fails/%D9%A1", known, b" 404 "),
    ):
        said = answer(line, headers)
        assert status in said.split(b"\r\n")[0], (line[:30], said[:200])
        assert b"X-Content-Type-Options: nosniff" in said
    for _ in range(30):
        assert b" 400 " in answer(b'garbage <0>{"level":"critical"}')
    assert "Traceback" not in agent.log()
    assert len(agent.log().splitlines()) < 60, "what repeats is counted, not printed"


async def test_what_fails_while_a_request_is_answered_is_one_500_with_the_headers() -> None:
    async def fails(_: web.Request) -> web.StreamResponse:
        raise LookupError("not so")

    app = web.Application(middlewares=[Guard(PreviewSettings()).middleware])
    app.router.add_get("/metrics", fails)
    async with TestClient(TestServer(app)) as client:
        with capture_logs() as said:
            answer = await client.get("/metrics")
    assert answer.status == 500
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert [(entry["event"], entry["reason"]) for entry in said] == [("page_request_failed", "LookupError")]


async def test_stations_on_one_host_keep_cookies_of_their_own(tmp_path: Path) -> None:
    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response()

    kept: dict[str, str] = {}  # of one browser, which knows hosts and names but no ports
    guards = []
    for name in ("left", "right"):
        (tmp_path / name).write_text(f"{TOKEN}-{name}")
        guards.append(Guard(PreviewSettings(token_file=tmp_path / name)))
        answer = await guards[-1].middleware(make_mocked_request("GET", f"/?token={TOKEN}-{name}"), page)
        kept |= {cookie.key: cookie.value for cookie in answer.cookies.values()}
    cookies = {"Cookie": "; ".join(f"{name}={value}" for name, value in kept.items())}
    for guard in guards:
        assert (await guard.middleware(make_mocked_request("GET", "/", headers=cookies), page)).status == 200


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["preview.host=0.0.0.0"], "preview.host"),
        (["preview.host=192.0.2.7"], "preview.host"),
        (["preview.token_file=nowhere"], "preview.token_file"),
        (["preview.udp_ports=[5, 4]"], "udp_ports"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_2(tmp_path: Path, settings: list[str], told: str) -> None:
    done = subprocess.run(Agent(tmp_path, *settings).command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line_and_exit_2(agent: Agent, tmp_path: Path) -> None:
    command = Agent(tmp_path, f"preview.port={agent.port}").command
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stderr
    assert f"127.0.0.1:{agent.port}" in done.stderr.splitlines()[-1]
    assert "preview.port" in done.stderr.splitlines()[-1]


def test_the_preview_can_be_left_out(start: Callable[..., Agent]) -> None:
    agent = start("preview.enabled=false")
    deadline = time.monotonic() + 90
    while "worker_ready" not in agent.log() and time.monotonic() < deadline:
        time.sleep(0.1)
    while status(agent)["last_seq"] < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", agent.port)) != 0
    assert status(agent)["last_seq"] >= 3
