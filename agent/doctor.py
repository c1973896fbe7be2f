"""`flawline doctor`: what this machine and this configuration lack, each finding with what to do about it.

Nothing is changed. This file looks at the configuration and where the station lives, doctor_machine.py at the rest.
"""

import contextlib
import errno
import fcntl
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import zmq

from flawline.agent import doctor_machine as machine
from flawline.agent.doctor_machine import Finding
from flawline.agent.endpoint import has_ipv6
from flawline.agent.service_files import HOMES
from flawline.agent.station_folder import JOURNAL, LOCK, PICTURES, station_folder
from flawline.camera.registry import make_camera
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.memory_versions import stored_sha256
from flawline.config.recipe import Precision
from flawline.config.settings import Settings
from flawline.config.sources import CREDENTIALS, keys_folder
from flawline.models.bundle import Bundle, open_bundle

_STATIONS = Path("/etc/flawline")  # the unit's configurations
_STATE_HOME = Path("/var/lib/flawline")  # the unit's StateDirectory
_HIDDEN = (*HOMES, "/tmp", "/var/tmp")  # by the unit's ProtectHome and PrivateTmp


def examine(settings: Settings) -> Iterator[Finding]:
    """All findings, as they are made."""
    running = _agent_is_running(settings)
    user = _service_user()
    checks: list[Callable[[], Iterator[Finding]]] = [
        machine.libraries,
        lambda: machine.gpu(settings),
        lambda: _bundle(settings),
        lambda: _cameras(settings, running, user),
        lambda: machine.network(settings),
        lambda: machine.usb(settings),
        lambda: _ports(settings, running),
        machine.clock,
        lambda: _state(settings, user),
        lambda: _secrets(settings, user),
    ]
    for check in checks:
        yield from check()


def _agent_is_running(settings: Settings) -> bool:
    """A running agent holds the lock of its journal's folder."""
    try:
        lock = os.open(station_folder(settings) / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _service_user() -> pwd.struct_passwd | None:
    """Who runs the station, where root asks about a station's configuration; else None: whoever asks runs it."""
    if os.geteuid() != 0 or _keys().parent != _STATIONS / "keys":
        return None
    try:
        return pwd.getpwnam("flawline")
    except KeyError:
        return None


def _keys() -> Path:
    """The folder that systemd takes the station's credentials from, as root."""
    return Path(os.environ.get(CREDENTIALS[1:], ""))


def _why_unseen(path: Path, user: pwd.struct_passwd) -> str | None:
    """What keeps a file or folder from the service; None where it can read it."""
    hidden = next((place for place in _HIDDEN if path.resolve().is_relative_to(place)), None)
    if hidden is not None:
        return f"cannot be seen by the service, as all below {hidden}"
    return None if _as(user, "test", "-r", path) else f"cannot be read by the service's user {user.pw_name}"


def _as(user: pwd.struct_passwd, *command: str | Path) -> bool:
    """Whether it succeeds as that user, so that folders on the way and access lists count."""
    try:
        done = subprocess.run(command, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/", check=False)
    except OSError:  # a root that may not become another user
        return True
    return done.returncode == 0


def _bundle(settings: Settings) -> Iterator[Finding]:
    try:
        bundle = open_bundle(settings.model.bundle)
        bundle.verify()
    except FlawlineError as error:
        yield Finding("bundle", "fail", str(error), "flawline models list; flawline models fetch NAME")
    else:
        yield Finding("bundle", "ok", f"{bundle.name} in {bundle.folder}: every checksum is right")
        for name, recipe in settings.recipes.items():
            try:
                memory = stored_sha256(Path(recipe.memory)) if recipe.memory else None
            except ConfigError as error:
                yield Finding("memory", "fail", f"recipe {name}: {error}", f"flawline learn --recipe {name}")
                continue
            warning = recipe.calibration_warning(bundle.name, bundle.sha256, memory, _precision(settings, bundle))
            if warning is not None:
                remedy = f"flawline calibrate --recipe {name}, with good parts"
                yield Finding("calibration", "warning", f"recipe {name}: {warning}", remedy)
            elif (made := recipe.calibration) is not None:
                yield Finding("calibration", "ok", f"recipe {name}: {made.date}, from {made.count} good parts")


def _precision(settings: Settings, bundle: Bundle) -> Precision | None:
    """What the models will judge at, as far as it is known without torch."""
    if settings.model.precision != "auto":
        return settings.model.precision
    if settings.model.device == "cpu":
        return "fp32"
    return bundle.manifest.precision if settings.model.device.startswith("cuda") else None


def _cameras(settings: Settings, running: bool, user: pwd.struct_passwd | None) -> Iterator[Finding]:
    for one in settings.cameras:
        where = f"camera {one.name} ({one.backend})"
        if running and one.backend not in ("simulated", "folder"):
            yield Finding("cameras", "ok", f"{where}: is the running agent's; see its status")
            continue
        try:
            with make_camera(one) as camera:
                about = ", ".join(f"{key} {value}" for key, value in camera.info().items() if value not in (None, ""))
        except FlawlineError as error:
            yield Finding("cameras", "fail", str(error), "flawline cameras list shows what answers")
        except Exception as error:  # a driver's own
            yield Finding("cameras", "fail", f"{where}: {type(error).__name__}: {error}", "see the camera's manual")
        else:
            yield Finding("cameras", "ok", f"{where} answers: {about}")
            if user is not None and one.path is not None and (unseen := _why_unseen(one.path, user)):
                remedy = f"move it to a place such as /srv/flawline that {user.pw_name} can read"
                yield Finding("cameras", "warning", f"{where}: {one.path} {unseen}", remedy)


def _ports(settings: Settings, running: bool) -> Iterator[Finding]:
    addresses = {"publish.endpoint": settings.publish.endpoint, "control.endpoint": settings.control.endpoint}
    troubles: dict[str, OSError | zmq.ZMQError | None]
    troubles = {key: _bind_socket(address) for key, address in addresses.items() if address.startswith("tcp://")}
    if settings.preview.enabled:
        addresses["preview.port"] = f"tcp://{settings.preview.host}:{settings.preview.port}"
        troubles["preview.port"] = _bind_page(settings.preview.host, settings.preview.port)
    for key, trouble in troubles.items():
        address, port = addresses[key], addresses[key].rpartition(":")[2]
        if trouble is None:
            yield Finding("ports", "ok", f"{key} {address} is free")
        elif trouble.errno == errno.EADDRINUSE and running:
            yield Finding("ports", "ok", f"{key} {address} is the running agent's")
        elif trouble.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
            remedy = f"ip -brief address shows what this machine has; set another {key.replace('port', 'host')}"
            yield Finding("ports", "fail", f"{key} {address}: {trouble.strerror}", remedy)
        else:
            remedy = f"ss -ltnp 'sport = :{port}' shows who has it; or set another {key}"
            yield Finding("ports", "fail", f"{key} {address}: {trouble.strerror}", remedy)


def _bind_socket(address: str) -> zmq.ZMQError | None:
    """As the agent does, so that interfaces' names and `*` mean the same."""
    with zmq.Context() as context, context.socket(zmq.PUB) as probe:
        try:
            probe.setsockopt(zmq.IPV6, has_ipv6(address))
            probe.bind(address)
        except zmq.ZMQError as error:
            return error
    return None


def _bind_page(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _state(settings: Settings, user: pwd.struct_passwd | None) -> Iterator[Finding]:
    folder = station_folder(settings)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    unwritable = _why_unwritable(folder, there, user)
    if unwritable is not None:
        remedy = "flawline service install makes the folder and its user; else set journal.path"
        if user is not None:
            owner = f"install -d -o {user.pw_name} -g {user.pw_name} -m 750 {settings.journal.path}"
            remedy = f"{owner}; chown -R {user.pw_name}: {settings.journal.path}"
            if not folder.is_relative_to(_STATE_HOME):
                edit = f"systemctl edit flawline@STATION: [Service] ReadWritePaths={settings.journal.path}"
                remedy = f"{remedy}; the service writes there only with a drop-in: {edit}"
        yield Finding("permissions", "fail", f"journal.path: {there} {unwritable}", remedy)
        return
    yield Finding("permissions", "ok", f"journal.path: {there} can be written")
    free_mb = shutil.disk_usage(there).free / 1e6
    journal = settings.journal
    verdicts_mb = max(0.0, journal.keep_mb - _held_mb(folder.glob(f"{JOURNAL}*")))
    pictures_mb = max(0.0, journal.archive_mb - _held_mb((folder / PICTURES).rglob("*")))
    wanted_mb = verdicts_mb + pictures_mb + journal.min_free_mb
    if free_mb < journal.min_free_mb:
        drop_in = "systemctl edit flawline@STATION: [Service] ReadWritePaths=/data/flawline"
        remedy = (
            f"make room, or set journal.path to a larger disk; a service writes there only with a drop-in: {drop_in}"
        )
        yield Finding("disk", "fail", f"{there}: {free_mb:.0f} MB are free, below journal.min_free_mb", remedy)
    elif free_mb < wanted_mb:
        found = (
            f"{there}: {free_mb:.0f} MB are free; what keep_mb and archive_mb still allow and min_free_mb add up to "
            f"{wanted_mb:.0f} MB"
        )
        yield Finding("disk", "warning", found, "make room, or set a smaller journal.keep_mb or journal.archive_mb")
    else:
        yield Finding("disk", "ok", f"{there}: {free_mb / 1000:.0f} GB are free")


def _why_unwritable(folder: Path, there: Path, user: pwd.struct_passwd | None) -> str | None:
    """What keeps who runs the station from writing into the folder, of which `there` is what exists."""
    if user is None:
        return None if os.access(there, os.W_OK | os.X_OK) else "cannot be written by this user"
    hidden = next((place for place in _HIDDEN if folder.resolve().is_relative_to(place)), None)
    if hidden is not None:
        return f"cannot be seen by the service, as all below {hidden}"
    if folder.is_relative_to(_STATE_HOME) and not _STATE_HOME.exists():
        return None  # systemd makes it, and gives it to that user
    if _as(user, "test", "-w", there, "-a", "-x", there):
        return None
    return f"cannot be written by the service's user {user.pw_name}"


def _held_mb(files: Iterable[Path]) -> float:
    total = 0
    for file in files:
        with contextlib.suppress(OSError):  # a running agent clears away
            total += file.stat().st_size
    return total / 1e6


def _secrets(settings: Settings, user: pwd.struct_passwd | None) -> Iterator[Finding]:
    for key, file, credential in (
        ("publish.curve_secret", settings.publish.curve_secret, "curve.secret"),
        ("control.curve_secret", settings.control.curve_secret, "curve.secret"),
        ("preview.token_file", settings.preview.token_file, "preview.token"),
    ):
        if file is None:
            continue
        try:
            mode = file.stat().st_mode
            file.read_bytes()
        except OSError as error:
            yield Finding("permissions", "fail", f"{key}: {file} cannot be read: {error.strerror}", f"ls -l {file}")
            continue
        trouble = "is open to others" if mode & 0o077 else None
        remedy = f"chmod 600 {file}"
        if user is not None and file.parent != _keys():  # those systemd reads and hands over
            trouble = _why_unseen(file, user) or trouble
            # Not chmod: root's file, closed to others, is closed to the service's user too.
            moved = f"install -D -m 600 {file} {_keys() / credential}; rm {file}"
            remedy = f'{moved}; then set {key} to "{CREDENTIALS}/{credential}"'
        if trouble:
            yield Finding("permissions", "fail", f"{key}: {file} {trouble}", remedy)
        else:
            yield Finding("permissions", "ok", f"{key}: {file} is ours alone")


def load_for_doctor(load: Callable[[], Settings], config: Path | None) -> Settings:
    """The settings; keys that are not there are findings, and no configuration that does not load."""
    if config is not None:
        os.environ.setdefault(CREDENTIALS[1:], str(keys_folder(config)))
    try:
        return load()
    except ConfigError as error:
        raise ConfigError(f"{error}; the doctor needs a configuration that loads") from error
