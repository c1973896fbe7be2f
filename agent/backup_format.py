"""What a backup looks like: a gzipped tar with `manifest.json` first, which is checked as a whole before it is used."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flawline.config.errors import ConfigError

SCHEMA = "flawline.backup/1"
MOST_MANIFEST_BYTES = 128 << 20
"""Some 400 000 files."""
_MODES = 0o664
"""No file of a station is a program, and none is everybody's to write: what else a backup says is taken off."""


@dataclass(frozen=True)
class Entry:
    """One file."""

    member: str  # its name in the tar
    path: str
    sha256: str
    mode: int
    owner: str  # of the user; empty where it had no name
    group: str


@dataclass(frozen=True)
class Manifest:
    """The backup's head."""

    created: float  # unix time
    config: str
    state: str
    files: tuple[Entry, ...]


def read_manifest(tar: tarfile.TarFile, source: Path) -> Manifest:
    """What stands first in an open backup; the path is for the error: ConfigError saying what is wrong with it."""
    try:
        return _manifest(tar)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _manifest(tar: tarfile.TarFile) -> Manifest:
    head = tar.next()
    stream = tar.extractfile(head) if head is not None and head.name == "manifest.json" else None
    if head is None or stream is None:
        raise ValueError("is not a backup of flawline")
    if head.size > MOST_MANIFEST_BYTES:
        raise ValueError(f"its manifest has {head.size >> 20} MiB; {MOST_MANIFEST_BYTES >> 20} are the most")
    try:
        raw = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its manifest is not readable: {error}") from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {raw.get('schema') if isinstance(raw, dict) else None!r}, not {SCHEMA!r}")
    created, files = raw.get("created"), raw.get("files")
    if not isinstance(created, int | float) or not 0 <= created < 1e11:
        raise ValueError("its manifest does not say when it was made")
    if not isinstance(files, list):
        raise ValueError("its manifest names no files")
    manifest = Manifest(float(created), _path(raw, "config"), _path(raw, "state"), tuple(map(_entry, files)))
    _check_distinct(manifest)
    return manifest


def _entry(raw: Any) -> Entry:
    if not isinstance(raw, dict):
        raise ValueError("one of its entries is no table")
    path, mode = _path(raw, "path"), raw.get("mode")
    member, sha256 = _text(raw, "member", path), _text(raw, "sha256", path)
    parts = PurePosixPath(member).parts
    if len(parts) != 2 or ".." in parts or not parts[0].isdigit():
        raise ValueError(f"the entry {path!r} is not one of a backup")
    if type(mode) is not int:
        raise ValueError(f"the entry {path!r} has the mode {mode!r}")
    owner, group = (_text(raw, key, path) if key in raw else "" for key in ("owner", "group"))
    return Entry(member, path, sha256, mode & _MODES, owner, group)


def _text(raw: dict[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"the entry {where!r} has no {key}")
    return value


def _path(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    parts = PurePosixPath(value).parts if isinstance(value, str) and "\0" not in value else ()
    if not isinstance(value, str) or len(parts) < 2 or parts[0] != "/" or ".." in parts:
        raise ValueError(f"the entry {value!r} is not one of a backup")
    return value


def _check_distinct(manifest: Manifest) -> None:
    """Every file has a place of its own, and none lies below another."""
    members = {entry.member for entry in manifest.files}
    paths = {PurePosixPath(entry.path) for entry in manifest.files}
    if not len(members) == len(paths) == len(manifest.files):
        raise ValueError("it names a file twice")
    for path in paths:
        if any(parent in paths for parent in path.parents):
            raise ValueError(f"the entry {str(path)!r} lies below another file")
