"""The files of a service: what `flawline service install` writes where, and takes away again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from flawline.config.errors import ConfigError

INSTALLED_AT = "/opt/flawline/bin/flawline"
"""The command as the shipped units name it; replaced by the one that installs them."""
HOMES = ("/home", "/root", "/run/user")  # which the unit's ProtectHome hides


@dataclass(frozen=True)
class ServiceFile:
    """One file to be written. The user's own (configuration) are written once, and never taken away."""

    path: Path
    text: str
    users_own: bool = False

    def action(self) -> str:
        """What writing it would do: `new`, `changed`, `same`, or `kept`."""
        try:
            there = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return "new"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: cannot be read: {error}") from error
        return "same" if there == self.text else "kept" if self.users_own else "changed"


def service_files(prefix: Path, station: str, command: Path | None = None) -> list[ServiceFile]:
    """All files below `prefix` (`/` for this machine). Raises ConfigError where the service could not run `command`."""
    own, command = command is None, command or Path(sys.executable).parent / "flawline"
    if not os.access(command, os.X_OK):
        raise ConfigError(f"{command}: the service's command is not there; install flawline with pip first")
    hidden = [command]
    if own and prefix == Path("/"):  # a venv's Python may itself lie elsewhere, and an editable install's sources too
        hidden += [path.resolve() for path in (command, Path(sys.executable), Path(sys.base_prefix), Path(__file__))]
    for path in hidden:
        if any(path.is_relative_to(home) for home in HOMES):
            instead = "install flawline into /opt/flawline, with the system's Python"
            raise ConfigError(f"{path}: a service does not see home directories; {instead}")
    shipped = files("flawline") / "systemd"

    def text(name: str) -> str:
        return (shipped / name).read_text(encoding="utf-8")

    units, etc = prefix / "etc/systemd/system", prefix / "etc"
    return [
        ServiceFile(units / "flawline@.service", text("flawline@.service").replace(INSTALLED_AT, str(command))),
        ServiceFile(units / "flawline-gpu.service", text("flawline-gpu.service")),
        ServiceFile(etc / "sysusers.d/flawline.conf", text("flawline.sysusers")),
        ServiceFile(etc / "tmpfiles.d/flawline.conf", text("flawline.tmpfiles")),
        ServiceFile(etc / "udev/rules.d/60-flawline.rules", text("60-flawline.rules")),
        ServiceFile(etc / f"flawline/{station}.toml", text("line1.toml").replace("line1", station), users_own=True),
        ServiceFile(etc / f"flawline/{station}.env", text("line1.env").replace("line1", station), users_own=True),
    ]


def write(file: ServiceFile) -> None:
    """Write it as a whole, unless it is the user's own and there. Raises ConfigError naming it."""
    if file.action() in ("same", "kept"):
        return
    partial = file.path.with_name(f".{file.path.name}.partial")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        partial.write_text(file.text, encoding="utf-8")
        partial.chmod(0o644)
        partial.replace(file.path)
    except OSError as error:
        raise ConfigError(f"{file.path}: cannot be written: {error.strerror or error}; are you root?") from error


def remove(file: ServiceFile) -> bool:
    """Take it away, unless it is the user's own. Returns whether it was there. Raises ConfigError naming it."""
    if file.users_own or not file.path.exists():
        return False
    try:
        file.path.unlink()
    except OSError as error:
        raise ConfigError(f"{file.path}: cannot be removed: {error.strerror or error}; are you root?") from error
    return True


def commands_after_install() -> list[list[str]]:
    """What makes user, folders, units and, where devices come and go, who may open cameras known on this machine."""
    known = [["systemd-sysusers"], ["systemd-tmpfiles", "--create", "flawline.conf"], ["systemctl", "daemon-reload"]]
    if Path("/run/udev").is_dir():
        known += [["udevadm", "control", "--reload"], ["udevadm", "trigger", "--subsystem-match=usb"]]
    return known


def commands_before_uninstall(prefix: Path) -> Iterator[list[str]]:
    """Every station is stopped, and none is started at boot any more."""
    yield ["systemctl", "stop", "flawline@*.service"]
    for link in sorted((prefix / "etc/systemd/system/multi-user.target.wants").glob("flawline@*.service")):
        yield ["systemctl", "disable", "--now", link.name]


def carry_out(command: list[str]) -> str:
    """Run one command of systemd's; returns what it said. Raises ConfigError where it fails or is not there."""
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]}: not found; a service needs systemd")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ConfigError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stderr.strip()
