"""Downloads of published weight files: resumed, checked, put in place at one stroke. No torch here."""

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from flawline.config.errors import BundleError, FetchError
from flawline.models.bundle import file_sha256
from flawline.models.known_bundles import PublishedFile

CHUNK_BYTES = 1 << 20
SPARE_BYTES = 64 << 20
"""Kept free on the disk beyond what is downloaded."""

Progress = Callable[[str, int, int], None]
"""Told the file's name, the bytes that are here, and the bytes of the whole."""


@dataclass(frozen=True)
class Patience:
    """How long a download waits, and how often it tries again without having come further."""

    connect_s: float = 30.0
    silence_s: float = 60.0
    tries: int = 5
    pause_s: float = 1.0  # doubled after every try that brought nothing, up to 30 s


class _Interrupted(Exception):
    """The transfer broke off for a reason that may pass."""


@dataclass
class _Part:
    """A file that is not complete: NAME.part, and beside it what the server called the version it is of."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_suffix(self.path.suffix + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self, url: str) -> str | None:
        """What If-Range asks for: the server's strong ETag, or its date. None where this part can't be gone on with."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        known = note.get("validator") if isinstance(note, dict) and note.get("url") == url else None
        return known if isinstance(known, str) else None

    def begin(self, url: str, headers: Mapping[str, str]) -> None:
        """Forget what is here; from now on it is the version that these headers name."""
        etag = headers.get("ETag")
        strong = etag if etag and not etag.startswith("W/") else None
        note = {"url": url, "validator": strong or headers.get("Last-Modified")}
        self.path.write_bytes(b"")
        self.note.write_text(json.dumps(note), encoding="utf-8")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


async def download(
    session: aiohttp.ClientSession,
    file: PublishedFile,
    target: Path,
    progress: Progress,
    patience: Patience,
) -> None:
    """Bring `file` to `target`. A `target` that is there already, or a part of it, is made use of.

    Raises BundleError naming the file and the address; a part that can't be right is removed.
    """
    part = _Part(target.with_name(target.name + ".part"))
    furthest, failures = part.size(), 0
    while True:
        try:
            await _transfer(session, file, part, progress, patience)
            break
        except (_Interrupted, aiohttp.ClientError, TimeoutError) as error:
            came = part.size()
            failures = 0 if came > furthest else failures + 1
            furthest = max(furthest, came)
            if failures >= patience.tries:
                raise FetchError(
                    f"{target.name}: {file.url}: {_reason(error)}; {came} of {file.size} bytes are here, "
                    "and the same command goes on from there"
                ) from error
        except OSError as error:
            raise FetchError(f"{part.path}: cannot be written: {error.strerror or error}") from error
        await asyncio.sleep(min(30.0, patience.pause_s * 2**failures) if failures else 0.0)
    await asyncio.to_thread(_settle, part, file, target)


async def _transfer(
    session: aiohttp.ClientSession, file: PublishedFile, part: _Part, progress: Progress, patience: Patience
) -> None:
    """One request, from where the part ends. Returns when the part has all its bytes."""
    here, headers = part.size(), {"Accept-Encoding": "identity"}
    validator = part.validator(file.url)
    if here > file.size or (here and validator is None):
        part.remove()
        here = 0
    if here == file.size:
        return
    if here and validator is not None:
        headers |= {"Range": f"bytes={here}-", "If-Range": validator}
    limits = aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s, sock_read=patience.silence_s)
    async with session.get(file.url, headers=headers, timeout=limits) as answer:
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise _Interrupted(f"the server answered {answer.status} {answer.reason}")
        if answer.status == 416:
            part.remove()
            raise _Interrupted("the server has another version of the file")
        if answer.status not in (200, 206):
            raise FetchError(f"{file.name}: {file.url}: the server answered {answer.status} {answer.reason}")
        start, total = _extent(answer)
        if start != (here if answer.status == 206 else 0):
            part.remove()
            raise _Interrupted("the server sent another range than was asked for")
        if total is not None and total != file.size:
            if answer.status == 206:  # else this is another document, as a gateway's page, and nothing of it is here
                part.remove()
            raise BundleError(
                f"{file.name}: {file.url}: the server's file has {total} bytes, {file.size} are expected: not this file"
            )
        if answer.status == 200:
            part.begin(file.url, answer.headers)
            here = 0
        progress(file.name, here, file.size)
        with part.path.open("ab") as stream:
            async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                stream.write(chunk)
                here += len(chunk)
                progress(file.name, here, file.size)
                if here > file.size:
                    break
    if here > file.size:
        part.remove()
        raise BundleError(
            f"{file.name}: {file.url}: the server sends more than the {file.size} bytes that are expected"
        )
    if here < file.size:
        raise _Interrupted(f"the answer ended after {here} of {file.size} bytes")


def _extent(answer: aiohttp.ClientResponse) -> tuple[int, int | None]:
    """Where the answer's bytes begin in the file, and how long the file is, if the server says so."""
    if answer.status == 200:
        return 0, answer.content_length
    unit, _, rest = answer.headers.get("Content-Range", "").partition(" ")
    place, _, total = rest.partition("/")
    first = place.partition("-")[0]
    if unit != "bytes" or not first.isdigit():
        return -1, None
    return int(first), int(total) if total.isdigit() else None


def _settle(part: _Part, file: PublishedFile, target: Path) -> None:
    """Check the complete part and put it in place."""
    actual = file_sha256(part.path)
    if actual != file.sha256:
        part.remove()
        raise BundleError(
            f"{target.name}: what came from {file.url} has checksum {actual[:12]}…, {file.sha256[:12]}… is expected: "
            "the transfer or the source is corrupt; it was removed, fetch it again"
        )
    with part.path.open("rb") as stream:
        os.fsync(stream.fileno())
    part.path.replace(target)
    part.note.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


def take_from(folder: Path, file: PublishedFile, target: Path, progress: Progress) -> None:
    """Copy `file` from a folder that holds it under its published name. Raises BundleError naming the file."""
    source, part = folder / file.name, _Part(target.with_name(target.name + ".part"))
    if not source.is_file():
        raise BundleError(f"{source}: not found; it is published as {file.url}")
    if (actual := file_sha256(source)) != file.sha256:
        raise BundleError(f"{source}: has checksum {actual[:12]}…, {file.sha256[:12]}… is expected: not this file")
    copy_file(source, part.path)
    progress(file.name, file.size, file.size)
    _settle(part, file, target)


def copy_file(source: Path, target: Path) -> None:
    """Raises BundleError naming the file that can't be written."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise FetchError(f"{target}: cannot be written from {source}: {error.strerror or error}") from error


def require_space(folder: Path, needed: int) -> None:
    """Raises BundleError where the disk has not `needed` bytes and some to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise BundleError(
            f"{folder}: {free / 1e9:.1f} GB are free on this disk, {(needed + SPARE_BYTES) / 1e9:.1f} GB are needed"
        )
