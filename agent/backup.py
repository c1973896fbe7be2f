"""One station in one file: configuration, recipes, memories, keys, journal. Its way back is in `restore`.

A gzipped tar with `manifest.json` first: what each file is, where it belongs, its sha256. The journal is copied by
SQLite's backup API, so a running agent goes on. The file holds secret keys and is written with mode 0600.
"""

import grp
import gzip
import hashlib
import json
import os
import pwd
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from flawline import __version__
from flawline.agent.backup_format import MOST_MANIFEST_BYTES, SCHEMA
from flawline.agent.safe_paths import as_owner_of, open_file, open_folder, own_ground
from flawline.agent.station_folder import BESIDE_JOURNAL, JOURNAL, LOCK, NUMBER_MARK, PICTURES, station_folder
from flawline.config.errors import ConfigError
from flawline.config.memory_versions import FOLDER, is_numbered
from flawline.config.settings import Settings
from flawline.config.sources import keys_folder

_NOT_STATE = {LOCK, JOURNAL, *(JOURNAL + suffix for suffix in BESIDE_JOURNAL), NUMBER_MARK}


def back_up(
    config: Path, settings: Settings, target: Path, *, pictures: bool, warn: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Write `target`; returns the paths that are in it. Raises ConfigError naming the file that is wrong.

    What a running agent clears away meanwhile, as archived pictures, is passed over. Of what the settings do not name
    but a folder holds, only plain files are taken; `warn` is told of what else is there.
    """
    state = station_folder(settings).absolute()
    named = {os.path.realpath(path): path for path in (*_of_config(config, settings), *_named_memories(settings))}
    kept = dict(named)
    for path in (*_memory_versions(config, settings), *_of_state(state, pictures)):
        kept.setdefault(os.path.join(os.path.realpath(path.parent), path.name), path)
    place = target.absolute().parent
    try:  # beside the target: /tmp may be memory
        with (
            open_folder(place) as there,
            tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=own_ground(place)) as name,
        ):
            folder = Path(name)
            created = time.time()  # numbers that are given out from here on may not be in it
            entries: list[dict[str, Any]] = []
            with tarfile.open(folder / "files", "w:gz") as tar:
                for path, copy in ((state / JOURNAL, _copy_journal), (state / NUMBER_MARK, _copy)):
                    if os.path.lexists(path):  # the mark after the journal: it covers all that the copy holds
                        entries.append(_add(tar, len(entries), path, folder / "one", copy(path, folder / "one", False)))
                for real, path in kept.items():
                    try:
                        status = _copy(path, folder / "one", real in named)
                    except (FileNotFoundError, ConfigError) as error:
                        if real in named:
                            raise
                        if isinstance(error, ConfigError):
                            warn(f"{error}; left out of the backup")
                        continue
                    entries.append(_add(tar, len(entries), path, folder / "one", status))
            _put_together(there, target.name, folder / "files", _manifest(config, settings, created, entries))
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


def _named_memories(settings: Settings) -> Iterator[Path]:
    for recipe in settings.recipes.values():
        if recipe.memory and Path(recipe.memory).is_file():
            yield Path(recipe.memory).absolute()


def _memory_versions(config: Path, settings: Settings) -> Iterator[Path]:
    """Every version beside what the recipes name, to roll back to; and what was learnt on the running line."""
    named = {Path(recipe.memory).absolute().parent for recipe in settings.recipes.values() if recipe.memory}
    for folder in sorted(named | {config.absolute().parent / FOLDER, settings.journal.path.absolute() / FOLDER}):
        yield from (path for path in sorted(folder.glob("*.safetensors")) if is_numbered(path))
        yield from sorted(folder.glob("*.history"))


def _of_state(state: Path, pictures: bool) -> Iterator[Path]:
    for place, folders, files in os.walk(state):  # passes over a folder that vanishes, goes into none by a link
        folders[:] = sorted(name for name in folders if pictures or Path(place, name) != state / PICTURES)
        for name in sorted((*files, *(name for name in folders if Path(place, name).is_symlink()))):
            path = Path(place, name)
            if path.relative_to(state).parts[0] not in _NOT_STATE:
                yield path


def _copy_journal(file: Path, copy: Path, _: bool) -> os.stat_result:
    """SQLite finds the journal's log by its name: where the folder is another user's, as that user."""
    with open_file(file, follow=False) as descriptor:
        status = os.fstat(descriptor)
    with as_owner_of(file.parent):
        source = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30, isolation_level=None)
        try:
            source.execute("BEGIN")  # one read transaction, during which an agent goes on committing
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            source.close()
            raise
    with closing(source), closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    return status


def _copy(path: Path, copy: Path, follow: bool) -> os.stat_result:
    """Nobody changes the copy, so that checksum and content are of one reading; the next one takes its place."""
    with open_file(path, follow=follow) as descriptor, copy.open("wb") as out:
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            shutil.copyfileobj(stream, out, 1 << 20)
        return os.fstat(descriptor)


def _add(tar: tarfile.TarFile, number: int, path: Path, copy: Path, status: os.stat_result) -> dict[str, Any]:
    """Put the copy into the tar in the place of the file; returns its entry in the manifest. The copy is gone then."""
    info = tar.gettarinfo(str(copy), arcname=f"{number:05}/{path.name}")
    info.uid, info.gid, info.mode = status.st_uid, status.st_gid, status.st_mode & 0o777
    info.uname, info.gname = _name_of(pwd.getpwuid, status.st_uid), _name_of(grp.getgrgid, status.st_gid)
    with copy.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        tar.addfile(info, stream)
    copy.unlink()
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
        "state": str(station_folder(settings).absolute()),
        "files": entries,
    }
    text = json.dumps(manifest, indent=1).encode()
    if len(text) > MOST_MANIFEST_BYTES:
        raise ConfigError(f"{len(entries)} files are more than a backup holds; try it without the pictures")
    return text


def _put_together(there: int, name: str, files: Path, manifest: bytes) -> None:
    """The manifest before the files that it tells of: two gzipped pieces one after the other are one gzipped file."""
    head = tarfile.TarInfo("manifest.json")
    head.size, head.mtime = len(manifest), int(time.time())
    partial = f".flawline-{secrets.token_hex(8)}.partial"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=there)
    try:
        with os.fdopen(descriptor, "wb") as out, files.open("rb") as stream:
            padding = b"\0" * (-len(manifest) % tarfile.BLOCKSIZE)
            out.write(gzip.compress(head.tobuf() + manifest + padding))
            shutil.copyfileobj(stream, out, 1 << 20)
        os.replace(partial, name, src_dir_fd=there, dst_dir_fd=there)
    except BaseException:
        os.unlink(partial, dir_fd=there)
        raise
