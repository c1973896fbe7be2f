"""The units, as systemd itself reads them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from needs import need_command

from flawline.agent.cli import cli
from flawline.agent.service_files import service_files, write
from flawline.config.errors import ConfigError
from flawline.config.sources import load_settings

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]
MOST_EXPOSED = 2.5


@pytest.fixture(scope="module")
def analyze() -> str:
    """systemd-analyze, of Debian's package `systemd`."""
    return need_command("systemd-analyze", "systemd")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A root folder into which the service was installed for station `press-3`."""
    command = tmp_path / "opt/flawline/bin/flawline"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    for file in service_files(tmp_path, "press-3", command):
        write(file)
    return tmp_path


def test_systemd_finds_nothing_wrong(analyze: str, installed: Path) -> None:
    units = installed / "etc/systemd/system"
    instance = units / "flawline@press-3.service"
    instance.symlink_to("flawline@.service")
    done = subprocess.run(
        [analyze, "verify", "--man=no", instance, units / "flawline-gpu.service"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # The same check does find what is wrong: an unknown key, and a command that is not there.
    wrong = installed / "wrong.service"
    wrong.write_text("[Service]\nExecStart=/nowhere/flawline\nWatchdogSeconds=3\n")
    done = subprocess.run([analyze, "verify", "--man=no", wrong], capture_output=True, text=True)
    assert "WatchdogSeconds" in done.stderr
    assert "/nowhere/flawline" in done.stderr


def test_a_station_is_little_exposed(analyze: str, installed: Path) -> None:
    unit = installed / "etc/systemd/system/flawline@.service"
    done = subprocess.run(
        [analyze, "security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", "--no-pager", unit],
        capture_output=True,
        text=True,
    )
    level = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level.group(1)) <= MOST_EXPOSED
    assert done.returncode == 0


def test_the_unit_fits_the_agent(installed: Path) -> None:
    text = (installed / "etc/systemd/system/flawline@.service").read_text()
    assert f"ExecStart={installed}/opt/flawline/bin/flawline run --config /etc/flawline/%i.toml" in text
    settings = load_settings(installed / "etc/flawline/press-3.toml", environ={})
    assert settings.station == "press-3"
    stop_limit = re.search(r"^TimeoutStopSec=(\d+)s$", text, re.MULTILINE)
    assert stop_limit is not None
    # Cameras 5 s, the drain, what is left to publish 30 s, the worker 3 s.
    assert int(stop_limit.group(1)) > 5 + settings.worker.drain_s + 30 + 3
    watchdog = re.search(r"^WatchdogSec=(\d+)s$", text, re.MULTILINE)
    assert watchdog is not None
    # A hanging worker is replaced by the agent before systemd replaces the agent.
    assert int(watchdog.group(1)) > settings.worker.ping_limit_s + 4 + 2
    assert "\nLimitNOFILE=65536\n" in text, "clients that hold connections leave the line its descriptors"


def test_install_shows_keeps_and_takes_away(tmp_path: Path) -> None:
    def service(*arguments: str) -> str:
        done = subprocess.run(
            [*CLI, "service", *arguments, "--prefix", str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = service("install", "--dry-run", "--station", "cell_7")
    assert "WatchdogSec=" in shown
    assert not (tmp_path / "etc").exists()
    service("install", "--station", "cell_7")
    config = tmp_path / "etc/flawline/cell_7.toml"
    config.write_text(config.read_text() + "# mine\n")
    unit = tmp_path / "etc/systemd/system/flawline@.service"
    unit.write_text("[Unit]\n")
    again = service("install", "--station", "cell_7")
    assert f"kept     {config}" in again
    assert f"changed  {unit}" in again
    assert config.read_text().endswith("# mine\n")
    assert "Type=notify" in unit.read_text()
    assert str(unit) in service("uninstall", "--dry-run")
    assert unit.exists()
    service("uninstall")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cell_7.toml", "cell_7.env"]


def test_a_station_has_a_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["service", "install", "--station", "../etc", "--prefix", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "station" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_the_service_could_not_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not there"):
        service_files(tmp_path, "line1", tmp_path / "flawline")
    home = Path("/home/anna/venv/bin/flawline")
    if not home.exists():
        with pytest.raises(ConfigError, match="flawline"):
            service_files(tmp_path, "line1", home)


def test_an_interpreter_that_lies_in_a_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a venv made with a Python from uv or pyenv."""
    command = tmp_path / "bin/flawline"
    command.parent.mkdir()
    command.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(command.with_name("python")))
    monkeypatch.setattr(sys, "base_prefix", "/root/.pyenv/versions/3.12")
    with pytest.raises(ConfigError, match=r"pyenv.*system's Python"):
        service_files(Path("/"), "line1")
    assert service_files(tmp_path, "line1"), "other roots have other Pythons"
