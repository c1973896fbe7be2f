"""One station in one file: configuration, recipes, memories, keys, journal; and its way back.

A gzipped tar with `manifest.json` first: what each file is, where it belongs, its sha256. The journal is copied by
SQLite's backup API, so a running agent goes on. The file holds secret keys and is written with mode 0600.

Numbers given out after the backup was made are not in it, and must not be given out again. A restored station
therefore skips as many numbers as could have been used meanwhile, and says so (`seq_jump` in its status).
"""

import contextlib
import fcntl
import grp
import gzip
import hashlib
import json
import os
import pwd
import shutil
import sqlite3
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, Any

from flawline import __version__
from flawline.agent.numbers import NumberMark
from flawline.agent.station_folder import BESIDE_JOURNAL, JOURNAL, LOCK, NUMBER_MARK, PICTURES, station_folder
from flawline.config.errors import ConfigError, JournalError
from flawline.config.memory_versions import FOLDER, is_numbered
from flawline.config.recipe_file import give
from flawline.config.settings import Settings
from flawline.config.sources import keys_folder

SCHEMA = "flawline.backup/1"
VERDICTS_PER_S = 100
"""The most that a station is thought to have published since the backup, for the numbers to skip."""
_NOT_STATE = {LOCK, JOURNAL, *(JOURNAL + suffix for suffix in BESIDE_JOURNAL), NUMBER_MARK}


def back_up(config: Path, settings: Settings, target: Path, *, pictures: bool) -> list[str]:
    """Write `target`; returns the paths that are in it. Raises ConfigError naming the file that is wrong.

    What a running agent clears away meanwhile, as archived pictures, is passed over.
    """
    state = station_folder(settings)
    surely = (*_of_config(config, settings), *_memories(config, settings))
    kept = {path.resolve(): path for path in (*surely, *_of_state(state, pictures))}
    may_go = kept.keys() - {path.resolve() for path in surely}
    try:  # beside the target: /tmp may be memory
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            folder = Path(name)
            created = time.time()  # numbers that are given out from here on may not be in it
            staged = {}
            if (state / JOURNAL).is_file():
                staged[state / JOURNAL] = _copy_journal(state / JOURNAL, folder)
            if (state / NUMBER_MARK).is_file():  # after the journal: the mark covers all that the copy holds
                staged[state / NUMBER_MARK] = Path(shutil.copy(state / NUMBER_MARK, folder))
            entries: list[dict[str, Any]] = []
            with tarfile.open(folder / "files", "w:gz") as tar:
                for path, copy in staged.items():
                    entries.append(_add(tar, len(entries), path, copy))
                    copy.unlink()
                for real, path in kept.items():
                    with contextlib.suppress(*((FileNotFoundError,) if real in may_go else ())):
                        entries.append(_add(tar, len(entries), path, _staged(path, folder)))
            _put_together(folder / "whole", folder / "files", _manifest(config, settings, created, entries))
            (folder / "whole").replace(target)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{target}: the backup cannot be written: {error}") from error
    return [entry["path"] for entry in entries]


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
    for place, folders, files in os.walk(state):  # passes over a folder that vanishes
        folders[:] = sorted(name for name in folders if pictures or Path(place, name) != state / PICTURES)
        for name in sorted(files):
            path = Path(place, name)
            if path.relative_to(state).parts[0] not in _NOT_STATE and path.is_file():
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


def _staged(path: Path, folder: Path) -> Path:
    """A copy that nobody changes, so that checksum and content are of one reading; the next one takes its place."""
    return Path(shutil.copyfile(path, folder / "one"))


def _add(tar: tarfile.TarFile, number: int, path: Path, copy: Path) -> dict[str, Any]:
    """Put the copy into the tar in the place of the file; returns its entry in the manifest."""
    info = tar.gettarinfo(str(copy), arcname=f"{number:05}/{path.name}")
    status = path.stat()
    info.uid, info.gid, info.mode = status.st_uid, status.st_gid, status.st_mode & 0o777
    info.uname, info.gname = _name_of(pwd.getpwuid, status.st_uid), _name_of(grp.getgrgid, status.st_gid)
    with copy.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        tar.addfile(info, stream)
    owner = {"owner": info.uname, "group": info.gname}
    return {"member": info.name, "path": str(path), "sha256": digest, "mode": info.mode, **owner}


def _name_of(look_up: Callable[[int], tuple[Any, ...]], number: int) -> str:
    """Of a user or group; empty where it has none."""
    try:
        return str(look_up(number)[0])
    except KeyError:
        return ""


def _manifest(config: Path, settings: Settings, created: float, entries: list[dict[str, Any]]) -> bytes:
    manifest = {
        "schema": SCHEMA,
        "flawline": __version__,
        "station": settings.station,
        "created": created,
        "config": str(config.absolute()),
        "state": str(station_folder(settings)),
        "files": entries,
    }
    return json.dumps(manifest, indent=1).encode()


def _put_together(whole: Path, files: Path, manifest: bytes) -> None:
    """The manifest before the files that it tells of: two gzipped pieces one after the other are one gzipped file."""
    head = tarfile.TarInfo("manifest.json")
    head.size, head.mtime = len(manifest), int(time.time())
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        padding = b"\0" * (-len(manifest) % tarfile.BLOCKSIZE)
        out.write(gzip.compress(head.tobuf() + manifest + padding))
        with files.open("rb") as stream:
            shutil.copyfileobj(stream, out, 1 << 20)


def restore(source: Path, prefix: Path, *, force: bool, skip_numbers: int | None) -> dict[str, Any]:
    """Put a backup's files where they came from, below `prefix`; returns the manifest with `skipped` and `written`.

    Everything is read and checked before the first file is written. Raises ConfigError where the file is no backup or
    damaged, where an agent is running on that state, or where files are there and `force` is not given.
    """
    state = _below(prefix, _read_manifest(source)["state"])
    place = next(path for path in state.parents if path.is_dir())  # beside what it becomes: /tmp may be memory
    with _working_folder(place) as folder:
        manifest = _unpack(source, folder)
        places = {entry["member"]: _below(prefix, entry["path"]) for entry in manifest["files"]}
        there = sorted(str(path) for path in places.values() if path.exists())
        if there and not force:
            raise ConfigError(f"{there[0]}: is there already ({len(there)} files in all); --force overwrites them")
        used = _numbers_used(state)
        owner = _owner(prefix)
        try:
            for entry in manifest["files"]:
                _put(folder / entry["member"], places[entry["member"]], entry, prefix)
                _own_state(places[entry["member"]], state, owner)
            for suffix in BESIDE_JOURNAL:  # of the journal that was there before
                (state / f"{JOURNAL}{suffix}").unlink(missing_ok=True)
            elapsed = max(0.0, time.time() - float(manifest["created"]))
            skipped = int(elapsed * VERDICTS_PER_S) if skip_numbers is None else skip_numbers
            if state.is_dir() and (skipped or used):
                _skip(state / NUMBER_MARK, skipped, used)
                _own(state / NUMBER_MARK, owner)
        except (OSError, JournalError) as error:
            raise ConfigError(f"{source}: cannot be restored: {error}") from error
    return manifest | {"skipped": skipped, "written": [str(path) for path in places.values()]}


@contextlib.contextmanager
def _working_folder(place: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=".flawline-restore-", dir=place))
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written: {error.strerror or error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _below(prefix: Path, path: str) -> Path:
    return prefix / PurePosixPath(path).relative_to("/")


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """The backup and its manifest. Whatever goes wrong inside is a ConfigError that names the backup."""
    try:
        with tarfile.open(source, "r:gz") as tar:
            head = tar.next()
            stream = tar.extractfile(head) if head is not None and head.name == "manifest.json" else None
            if stream is None:
                raise ConfigError(f"{source}: is not a backup of flawline")
            manifest: dict[str, Any] = json.load(stream)
            if manifest.get("schema") != SCHEMA:
                raise ConfigError(f"{source}: its schema is {manifest.get('schema')!r}, not {SCHEMA!r}")
            for path in (manifest["state"], *(entry["path"] for entry in manifest["files"])):
                parts = PurePosixPath(path).parts
                if parts[0] != "/" or ".." in parts:
                    raise ConfigError(f"{source}: the entry {path!r} is not one of a backup")
            yield tar, manifest
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: cannot be read as a backup: {error}") from error


def _read_manifest(source: Path) -> dict[str, Any]:
    with _opened(source) as (_, manifest):
        return manifest


def _unpack(source: Path, folder: Path) -> dict[str, Any]:
    with _opened(source) as (tar, manifest):
        for entry in manifest["files"]:
            inner = tar.extractfile(entry["member"])
            if inner is None or not _is_plain(entry["member"]):
                raise ConfigError(f"{source}: the entry {entry['path']!r} is not one of a backup")
            if _copy_out(inner, folder / entry["member"]) != entry["sha256"]:
                raise ConfigError(f"{source}: is damaged: {entry['path']} has another checksum")
    return manifest


def _copy_out(inner: IO[bytes], target: Path) -> str:
    """Returns the checksum of what was written. Raises ConfigError naming the place that cannot be written to."""
    digest = hashlib.sha256()
    while True:
        chunk = inner.read(1 << 20)
        try:
            target.parent.mkdir(exist_ok=True)
            with target.open("ab") as out:
                out.write(chunk)
        except OSError as error:
            place = target.parent.parent.parent
            raise ConfigError(f"{place}: the backup cannot be unpacked there: {error.strerror or error}") from error
        digest.update(chunk)
        if not chunk:
            return digest.hexdigest()


def _is_plain(member: str) -> bool:
    parts = PurePosixPath(member).parts
    return len(parts) == 2 and ".." not in parts and parts[0].isdigit()


def _numbers_used(state: Path) -> int:
    """Up to which number verdicts may have gone out from what stands there now; 0 where nothing does."""
    if not state.is_dir():
        return 0
    try:
        lock = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigError(f"{state}: cannot be used: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{state}: an agent is running on it; stop it first") from error
    finally:
        os.close(lock)
    mark = NumberMark(state / NUMBER_MARK)
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


def _put(source: Path, target: Path, entry: dict[str, Any], prefix: Path) -> None:
    """Owner and group are those of the file that is overwritten; else, where we may, those of the same names.

    Raises ConfigError naming the file.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as out, source.open("rb") as stream:
            shutil.copyfileobj(stream, out)
        if target.exists():
            there = target.stat()
            give(partial, there.st_uid, there.st_gid)
        elif os.geteuid() == 0 and prefix == Path("/"):
            with contextlib.suppress(KeyError):
                give(partial, -1, grp.getgrnam(entry.get("group", "")).gr_gid)
            with contextlib.suppress(KeyError):
                give(partial, pwd.getpwnam(entry.get("owner", "")).pw_uid, -1)
        partial.chmod(entry["mode"])
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{target}: cannot be restored: {error.strerror or error}") from error


def _own_state(target: Path, state: Path, owner: str | None) -> None:
    """State and what was learnt belong to the service's user, and so do their folders."""
    for folder in (state, state.parent / FOLDER):
        if target.is_relative_to(folder):
            for path in (target, *target.parents):
                _own(path, owner)
                if path == folder:
                    break
