"""One station in one file: configuration, recipes, memories, keys, journal; and its way back.

A gzipped tar with `manifest.json` first: what each file is, where it belongs, its sha256. The journal is copied by
SQLite's backup API, so a running agent goes on. The file holds secret keys and is written with mode 0600.

Numbers given out after the backup was made are not in it, and must not be given out again. A restored station
therefore skips as many numbers as could have been used meanwhile, and says so (`seq_jump` in its status).
"""

import fcntl
import hashlib
import io
import json
import os
import pwd
import shutil
import sqlite3
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

from flawline import __version__
from flawline.agent.numbers import NumberMark
from flawline.config.errors import ConfigError, JournalError
from flawline.config.memory_versions import FOLDER, is_numbered
from flawline.config.settings import Settings
from flawline.config.sources import keys_folder

SCHEMA = "flawline.backup/1"
VERDICTS_PER_S = 100
"""The most that a station is thought to have published since the backup, for the numbers to skip."""
_NOT_STATE = {"lock", "journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm", "seq.mark"}


def back_up(config: Path, settings: Settings, target: Path, *, pictures: bool) -> list[str]:
    """Write `target`; returns the paths that are in it. Raises ConfigError naming the file that is wrong."""
    state = settings.journal.path / settings.station
    kept = (*_of_config(config, settings), *_memories(config, settings), *_of_state(state, pictures))
    wanted = {path.resolve(): path for path in kept}
    partial = target.with_name(f".{target.name}.partial")
    try:
        with tempfile.TemporaryDirectory(prefix="flawline-backup-") as folder:
            copies = {path: path for path in wanted.values()}
            if (state / "journal.sqlite").is_file():
                copies[state / "journal.sqlite"] = _copy_journal(state / "journal.sqlite", Path(folder))
            if (state / "seq.mark").is_file():  # after the journal: the mark covers all that the copy holds
                copies[state / "seq.mark"] = Path(shutil.copy(state / "seq.mark", folder))
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as tar:
                _write(tar, copies, config, settings)
        partial.replace(target)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{target}: the backup cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return [str(path) for path in copies]


def _of_config(config: Path, settings: Settings) -> Iterator[Path]:
    yield config.absolute()
    environment = config.absolute().with_suffix(".env")
    for path in (
        *(environment, keys_folder(config), settings.publish.curve_secret, settings.publish.curve_clients),
        *(settings.control.curve_secret, settings.control.curve_clients, settings.preview.token_file),
    ):
        if path is not None and path.is_file():
            yield path
        elif path is not None and path.is_dir():
            yield from sorted(inner for inner in path.rglob("*") if inner.is_file())


def _memories(config: Path, settings: Settings) -> Iterator[Path]:
    """What the recipes name, and every version beside it, to roll back to; and what was learnt on the running line."""
    named = [Path(recipe.memory).absolute() for recipe in settings.recipes.values() if recipe.memory]
    folders = {memory.parent for memory in named} | {config.absolute().parent / FOLDER, settings.journal.path / FOLDER}
    yield from (memory for memory in named if memory.is_file())
    for folder in sorted(folders):
        yield from (path for path in sorted(folder.glob("*.safetensors")) if is_numbered(path))
        yield from sorted(folder.glob("*.history"))


def _of_state(state: Path, pictures: bool) -> Iterator[Path]:
    for path in sorted(state.rglob("*")):
        first = path.relative_to(state).parts[0]
        if path.is_file() and first not in _NOT_STATE and (pictures or first != "pictures"):
            yield path


def _copy_journal(file: Path, folder: Path) -> Path:
    copy = folder / file.name
    with (
        closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)  # one read transaction, during which an agent goes on committing
        target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    return copy


def _write(tar: tarfile.TarFile, copies: dict[Path, Path], config: Path, settings: Settings) -> None:
    entries: list[dict[str, Any]] = []
    members: list[tuple[tarfile.TarInfo, Path]] = []
    for number, (path, copy) in enumerate(copies.items()):
        info = tar.gettarinfo(str(copy), arcname=f"{number:05}/{path.name}")
        owner = path.stat()
        info.uid, info.gid, info.mode = owner.st_uid, owner.st_gid, owner.st_mode & 0o777
        with copy.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        entries.append({"member": info.name, "path": str(path), "sha256": digest, "mode": info.mode})
        members.append((info, copy))
    manifest = {
        "schema": SCHEMA,
        "flawline": __version__,
        "station": settings.station,
        "created": time.time(),
        "config": str(config.absolute()),
        "state": str(settings.journal.path / settings.station),
        "files": entries,
    }
    text = json.dumps(manifest, indent=1).encode()
    head = tarfile.TarInfo("manifest.json")
    head.size, head.mtime = len(text), int(time.time())
    tar.addfile(head, io.BytesIO(text))
    for info, copy in members:
        with copy.open("rb") as stream:
            tar.addfile(info, stream)


def restore(source: Path, prefix: Path, *, force: bool, skip_numbers: int | None) -> dict[str, Any]:
    """Put a backup's files where they came from, below `prefix`; returns the manifest with `skipped` and `written`.

    Everything is read and checked before the first file is written. Raises ConfigError where the file is no backup or
    damaged, where an agent is running on that state, or where files are there and `force` is not given.
    """
    with tempfile.TemporaryDirectory(prefix="flawline-restore-") as folder:
        manifest = _unpack(source, Path(folder))
        places = {
            entry["member"]: prefix / PurePosixPath(entry["path"]).relative_to("/") for entry in manifest["files"]
        }
        there = sorted(str(path) for path in places.values() if path.exists())
        if there and not force:
            raise ConfigError(f"{there[0]}: is there already ({len(there)} files in all); --force overwrites them")
        state = prefix / PurePosixPath(manifest["state"]).relative_to("/")
        used = _numbers_used(state)
        owner = _owner(prefix)
        try:
            for entry in manifest["files"]:
                _put(Path(folder) / entry["member"], places[entry["member"]], entry["mode"], state, owner)
            for suffix in ("-wal", "-shm"):  # of the journal that was there before
                (state / f"journal.sqlite{suffix}").unlink(missing_ok=True)
            elapsed = max(0.0, time.time() - float(manifest["created"]))
            skipped = int(elapsed * VERDICTS_PER_S) if skip_numbers is None else skip_numbers
            if state.is_dir() and (skipped or used):
                _skip(state / "seq.mark", skipped, used)
                _own(state / "seq.mark", owner)
        except (OSError, JournalError) as error:
            raise ConfigError(f"{source}: cannot be restored: {error}") from error
    return manifest | {"skipped": skipped, "written": [str(path) for path in places.values()]}


def _unpack(source: Path, folder: Path) -> dict[str, Any]:
    try:
        with tarfile.open(source, "r:gz") as tar:
            head = tar.next()
            stream = tar.extractfile(head) if head is not None and head.name == "manifest.json" else None
            if stream is None:
                raise ConfigError(f"{source}: is not a backup of flawline")
            manifest: dict[str, Any] = json.load(stream)
            if manifest.get("schema") != SCHEMA:
                raise ConfigError(f"{source}: its schema is {manifest.get('schema')!r}, not {SCHEMA!r}")
            for entry in manifest["files"]:
                inner = tar.extractfile(entry["member"])
                parts = PurePosixPath(entry["path"]).parts
                if inner is None or parts[0] != "/" or ".." in parts or not _is_plain(entry["member"]):
                    raise ConfigError(f"{source}: the entry {entry['path']!r} is not one of a backup")
                target = folder / entry["member"]
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(inner, out)
                with target.open("rb") as again:
                    if hashlib.file_digest(again, "sha256").hexdigest() != entry["sha256"]:
                        raise ConfigError(f"{source}: is damaged: {entry['path']} has another checksum")
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: cannot be read as a backup: {error}") from error
    return manifest


def _is_plain(member: str) -> bool:
    parts = PurePosixPath(member).parts
    return len(parts) == 2 and ".." not in parts and parts[0].isdigit()


def _numbers_used(state: Path) -> int:
    """Up to which number verdicts may have gone out from what stands there now; 0 where nothing does."""
    if not state.is_dir():
        return 0
    try:
        lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigError(f"{state}: cannot be used: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{state}: an agent is running on it; stop it first") from error
    finally:
        os.close(lock)
    mark = NumberMark(state / "seq.mark")
    used = max(mark.reserved, mark.floor)
    mark.close()
    return used


def _skip(file: Path, numbers: int, used: int) -> None:
    """The next agent goes on above what was used by then, and announces the jump."""
    mark = NumberMark(file)
    try:
        mark.jump(max(mark.reserved + numbers, used))
    finally:
        mark.close()


def _owner(prefix: Path) -> str | None:
    """The service's user on this machine, where we may give files away."""
    if os.geteuid() != 0 or prefix != Path("/"):
        return None
    try:
        return pwd.getpwnam("flawline").pw_name
    except KeyError:
        return None


def _own(path: Path, owner: str | None) -> None:
    if owner is not None:
        shutil.chown(path, owner, owner)


def _put(source: Path, target: Path, mode: int, state: Path, owner: str | None) -> None:
    """State and what was learnt belong to the service's user; configuration and keys to who restores them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as out, source.open("rb") as stream:
        shutil.copyfileobj(stream, out)
    partial.chmod(mode)
    partial.replace(target)
    for folder in (state, state.parent / FOLDER):
        if target.is_relative_to(folder):
            for path in (target, *target.parents):
                _own(path, owner)
                if path == folder:
                    break
