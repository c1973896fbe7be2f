"""What stands in the log, and what never does."""

import json
import os
from pathlib import Path

import pytest
import structlog

from flawline.config.errors import ConfigError
from flawline.config.logging import RateLimit, set_up_logging
from flawline.config.settings import LogSettings
from flawline.config.sources import load_settings


@pytest.fixture(autouse=True)
def _as_before() -> object:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_one_json_object_a_line_with_station_and_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogSettings(), station="line1")
    log = structlog.get_logger()
    log.info("x", preview_token="abc", url="rtsp://admin:hunter2@10.0.0.5/1", error="no rtsp://u:hunter2@h answers")
    log.debug("not written")
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["station"]) == ("x", "info", "line1")
    assert event["preview_token"] == "***"
    assert event["url"] == "rtsp://***@10.0.0.5/1"
    assert "hunter2" not in line
    assert "abc" not in line


def test_what_is_nested_and_the_traceback_have_no_passwords_either(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogSettings())
    try:
        raise ValueError("rtsp://admin:hunter2@cam/1 is wrong")
    except ValueError:
        structlog.get_logger().exception(
            "x", cameras=[{"url": "http://cam/?pw=hunter2", "api_token": "hunter2"}], more=("rtsp://a:hunter2@b",)
        )
    line = capsys.readouterr().err
    assert "hunter2" not in line
    assert "ValueError" in json.loads(line)["exception"]


def test_in_a_service_lines_begin_with_their_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        monkeypatch.setattr("sys.stderr", stream)
        set_up_logging(LogSettings())
        log = structlog.get_logger()
        log.info("a")
        log.warning("b")
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("c")
        stream.flush()
        lines = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in lines] == ["<6>", "<4>", "<3>"]
    assert "ValueError: why" in json.loads(lines[2][3:])["exception"]


def test_repeats_are_counted_instead_of_written() -> None:
    now = [0.0]
    limit = RateLimit(most=3, window_s=60, now=lambda: now[0], kinds=2)

    def written(event: str, **more: str) -> dict[str, object] | None:
        try:
            return dict(limit(None, "error", {"event": event, **more}))
        except structlog.DropEvent:
            return None

    assert [written("lost", camera="top") is not None for _ in range(8)] == [True] * 3 + [False] * 5
    assert written("lost", camera="side") is not None
    now[0] = 61
    assert written("lost", camera="top") == {"event": "lost", "camera": "top", "repeats_kept_back": 5}
    assert "repeats_kept_back" not in (written("lost", camera="top") or {})
    for number in range(50):  # kinds without end do not fill the memory
        written(f"kind {number}")
    assert len(limit._seen) <= 2


def test_keys_come_from_systemds_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "line.toml"
    file.write_text('[publish]\ncurve_secret = "$CREDENTIALS_DIRECTORY/curve.secret"\n')
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    assert load_settings(file, environ={}).publish.curve_secret == Path("/run/credentials/x/curve.secret")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match=r"publish\.curve_secret: .*CREDENTIALS_DIRECTORY is not set"):
        load_settings(file, environ={})
