"""What the doctor finds on a machine that is well, and on one that is not."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_bundle import write_tiny_bundle

from flawline.agent import doctor as doctors
from flawline.agent.doctor import (
    Finding,
    _agent_is_running,
    _cameras,
    _ports,
    _secrets,
    _service_user,
    _state,
    load_for_doctor,
)
from flawline.agent.journal import Journal
from flawline.config.sources import load_settings

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def doctor(config: Path, **environment: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Exit code, and findings by check."""
    done = subprocess.run(
        [*CLI, "doctor", "--config", str(config), "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | environment,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] == (done.returncode == 0)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return done.returncode, found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config(folder: Path, more: str = "", publish: int | None = None) -> Path:
    file = folder / "line.toml"
    file.write_text(
        f'[publish]\nendpoint = "tcp://127.0.0.1:{publish or free_port()}"\n'
        f'[control]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n'
        f'[preview]\nport = {free_port()}\n[journal]\npath = "state"\nmin_free_mb = 1\narchive_mb = 1\nkeep_mb = 1\n'
        + more
    )
    return file


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "tiny")
    code, found = doctor(config(tmp_path, '[model]\nbundle = "tiny"\ndevice = "cpu"\n'), FLAWLINE_BUNDLES=str(tmp_path))
    assert code == 0, found
    assert {finding["verdict"] for check in ("bundle", "cameras", "ports", "disk") for finding in found[check]} == {
        "ok"
    }
    assert "torch 2" in found["torch"][0]["found"]
    assert len(found["ports"]) == 3


def test_the_running_agents_ports_are_its_own(tmp_path: Path) -> None:
    file = config(tmp_path, '[model]\ndevice = "cpu"\n')
    settings = load_settings(file, environ={})
    taken = int(settings.publish.endpoint.rsplit(":", 1)[1])
    journal = Journal(settings.journal.path / settings.station)  # holds the lock, as an agent does
    with socket.socket() as agents:
        agents.bind(("127.0.0.1", taken))
        agents.listen()
        findings = list(_ports(settings, _agent_is_running(settings)))
    assert [finding.verdict for finding in findings] == ["ok"] * 3
    assert "running agent's" in findings[0].found
    journal.close()


def test_each_fault_is_named_with_its_remedy(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    weights = next(path for path in sorted(bundle.rglob("*")) if path.suffix == ".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "token").write_text("abc")
    (tmp_path / "token").chmod(0o644)
    (tmp_path / "state").write_text("a file, no folder")
    cameras = '[[cameras]]\nname = "top"\nbackend = "folder"\npath = "nowhere"\n'
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        file = config(tmp_path, '[model]\nbundle = "tiny"\ndevice = "cuda"\n' + cameras, publish=port)
        file.write_text(file.read_text().replace("[preview]\n", '[preview]\ntoken_file = "token"\n'))
        code, found = doctor(file, FLAWLINE_BUNDLES=str(tmp_path))
    failed = {
        check: next(finding for finding in findings if finding["verdict"] == "fail")
        for check, findings in found.items()
        if any(finding["verdict"] == "fail" for finding in findings)
    }
    assert code == 1
    assert {"bundle", "cameras", "ports"} <= failed.keys()
    assert weights.name in failed["bundle"]["found"]
    assert "nowhere" in failed["cameras"]["found"]
    assert f"sport = :{port}" in failed["ports"]["remedy"]
    remedies = [finding["remedy"] for finding in found["permissions"]]
    assert f"chmod 600 {tmp_path / 'token'}" in remedies
    assert all(finding["remedy"] for finding in failed.values())


def test_a_configuration_that_does_not_load_is_exit_2(tmp_path: Path) -> None:
    file = config(tmp_path, "[modle]\n")
    done = subprocess.run([*CLI, "doctor", "--config", str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "did you mean 'model'" in done.stderr


@pytest.fixture
def etc(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of /etc/flawline that all may read, and `nobody` in the place of the user flawline."""
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(pwd, "getpwnam", lambda name: {"flawline": nobody}[name])
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "set, so that it is taken back at the end")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(doctors, "_STATIONS", Path(folder))
        monkeypatch.setattr(doctors, "_HIDDEN", (f"{folder}/home",))
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at files as another user")
def test_root_is_told_what_the_services_user_cannot_read(etc: Path) -> None:
    def token(mode: int, file: str = "preview.token") -> Finding:
        (etc / file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        (etc / file).write_text("0123456789abcdef")
        (etc / file).chmod(mode)
        (finding,) = _secrets(settings, _service_user())
        return finding

    line = config(etc)
    line.write_text(line.read_text().replace("[preview]\n", '[preview]\ntoken_file = "preview.token"\n'))
    settings = load_for_doctor(lambda: load_settings(line, environ={}), line)
    kept = etc / "keys/line/preview.token"
    for mode, says in ((0o644, "is open to others"), (0o600, "cannot be read by the service's user nobody")):
        finding = token(mode)
        assert finding.verdict == "fail"
        assert says in finding.found
        assert str(kept) in finding.remedy
        assert 'preview.token_file to "$CREDENTIALS_DIRECTORY/preview.token"' in finding.remedy
        assert "chmod" not in finding.remedy
    line.write_text(line.read_text().replace('"preview.token"', '"$CREDENTIALS_DIRECTORY/preview.token"'))
    settings = load_for_doctor(lambda: load_settings(line, environ={}), line)
    assert token(0o600, "keys/line/preview.token").verdict == "ok"  # root's alone: systemd hands it over
    assert token(0o644, "keys/line/preview.token").remedy == f"chmod 600 {kept}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at files as another user")
@pytest.mark.parametrize(("place", "mode", "says"), [("home", 0o755, "cannot be seen"), ("srv", 0o700, "nobody")])
def test_root_is_warned_of_pictures_that_the_service_does_not_see(etc: Path, place: str, mode: int, says: str) -> None:
    (etc / place).mkdir()
    cv2.imwrite(str(etc / place / "1.png"), np.zeros((64, 64), np.uint8))
    (etc / place).chmod(mode)
    line = config(etc, f'[[cameras]]\nname = "top"\nbackend = "folder"\npath = "{place}"\n')
    settings = load_for_doctor(lambda: load_settings(line, environ={}), line)
    findings = list(_cameras(settings, False, _service_user()))
    assert [finding.verdict for finding in findings] == ["ok", "warning"]
    assert says in findings[1].found
    (etc / place).rename(etc / "seen")
    (etc / "seen").chmod(0o755)
    line.write_text(line.read_text().replace(f'"{place}"', '"seen"'))
    settings = load_settings(line, environ={})
    assert [finding.verdict for finding in _cameras(settings, False, _service_user())] == ["ok"]


def test_another_configuration_is_not_a_services(etc: Path, tmp_path: Path) -> None:
    line = config(tmp_path)
    load_for_doctor(lambda: load_settings(line, environ={}), line)
    assert _service_user() is None


def test_a_larger_disk_comes_with_the_services_drop_in(tmp_path: Path) -> None:
    line = config(tmp_path)
    settings = load_settings(line, ["journal.min_free_mb=1e9"], environ={})
    (finding,) = (finding for finding in _state(settings, None) if finding.check == "disk")
    assert "ReadWritePaths=/data/flawline" in finding.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at folders as another user")
def test_root_is_told_where_the_services_user_cannot_write(etc: Path) -> None:
    line = config(etc)
    settings = load_for_doctor(lambda: load_settings(line, environ={}), line)
    (etc / "state").mkdir(mode=0o755)
    (finding,) = (one for one in _state(settings, _service_user()) if one.check == "permissions")
    assert finding.verdict == "fail"
    assert "cannot be written by the service's user nobody" in finding.found
    assert f"ReadWritePaths={etc / 'state'}" in finding.remedy
    os.chown(etc / "state", pwd.getpwnam("flawline").pw_uid, -1)
    assert [one.verdict for one in _state(settings, _service_user())] == ["ok", "ok"]
    settings = load_settings(line, [f"journal.path={etc}/home/state"], environ={})
    assert "cannot be seen by the service" in next(_state(settings, _service_user())).found


def test_room_is_wanted_for_the_verdicts_that_may_still_come(tmp_path: Path) -> None:
    line = config(tmp_path)
    free_mb = shutil.disk_usage(tmp_path).free / 1e6
    settings = load_settings(line, [f"journal.keep_mb={free_mb + 1000}"], environ={})

    def disk() -> Finding:
        return list(_state(settings, None))[-1]

    assert (disk().check, disk().verdict) == ("disk", "warning")
    assert "keep_mb" in disk().remedy
    journal = settings.journal.path / settings.station / "journal.sqlite"
    journal.parent.mkdir(parents=True)
    with journal.open("wb") as stream:
        stream.truncate(int((free_mb + 1000) * 1e6))  # sparse: the disk has as much room as before
    assert disk().verdict == "ok"


@pytest.mark.parametrize(
    ("address", "verdict"),
    [
        ("tcp://nosuchcard0:5555", "fail"),
        ("tcp://192.0.2.7:1", "fail"),
    ],
)
def test_ports_are_read_as_the_agent_reads_them(tmp_path: Path, address: str, verdict: str) -> None:
    settings = load_settings(config(tmp_path), [f"publish.endpoint={address}"], environ={})
    first, *_ = _ports(settings, False)
    assert (first.verdict, address in first.found) == (verdict, True)
    assert "publish.endpoint" in first.remedy or verdict == "ok"
