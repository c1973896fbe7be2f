"""The way back of a backup: its files to where they came from.

Numbers given out after the backup was made are not in it, and must not be given out again. A restored station
therefore skips as many numbers as could have been used meanwhile, and says so (`seq_jump` in its status).

Root writes into folders of the service's user here, so no name in them is followed (`safe_paths`), every file is made
anew under a name that nobody can foresee, and owner and mode are set by its descriptor.
"""

import contextlib
import fcntl
import grp
import hashlib
import os
import pwd
import secrets
import shutil
import stat
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from flawline.agent.backup_format import Entry, Manifest, read_manifest
from flawline.agent.numbers import NumberMark
from flawline.agent.safe_paths import open_folder, open_in, own_ground
from flawline.agent.station_folder import BESIDE_JOURNAL, JOURNAL, LOCK, NUMBER_MARK
from flawline.config.errors import ConfigError, JournalError
from flawline.config.memory_versions import FOLDER
from flawline.config.recipe_file import give

VERDICTS_PER_S = 100
"""The most that a station is thought to have published since the backup, for the numbers to skip."""
_ROOM_LEFT = 64 << 20  # bytes of the disk that are not filled


@dataclass(frozen=True)
class Restored:
    """What was done."""

    written: list[Path]
    skipped: int  # numbers


def restore(source: Path, prefix: Path, *, force: bool, skip_numbers: int | None, everywhere: bool = False) -> Restored:
    """Put a backup's files back where they came from, below `prefix`.

    Everything is read and checked before the first file is written. Raises ConfigError where the file is no backup or
    damaged, where an agent is running on that state, where files are there and `force` is not given, or where one
    belongs outside the folders of configuration, state and memories and `everywhere` is not given.
    """
    with contextlib.ExitStack() as stack:
        with _reading(source):
            tar = stack.enter_context(tarfile.open(source, "r:gz"))
            manifest = read_manifest(tar, source)
        state = _below(prefix, manifest.state)
        places = {entry: _below(prefix, entry.path) for entry in manifest.files}
        _check_places(manifest, places, force, everywhere)
        folder = stack.enter_context(_working_folder(own_ground(state.parent)))  # beside the state: /tmp may be memory
        with _reading(source):
            _unpack(tar, manifest, folder, source)
        used = stack.enter_context(_numbers_used(state))
        owner = _owner(prefix)
        try:
            for entry, place in places.items():
                _put(folder / entry.member, place, entry, prefix, owner if _is_states(place, state) else None)
            _hand_over(places.values(), state, owner)
            elapsed = max(0.0, time.time() - manifest.created)
            skipped = int(elapsed * VERDICTS_PER_S) if skip_numbers is None else skip_numbers
            _finish_state(state, skipped, used, owner)
        except (OSError, JournalError) as error:
            raise ConfigError(f"{source}: cannot be restored: {error}") from error
    return Restored([*places.values()], skipped)


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
def _reading(source: Path) -> Iterator[None]:
    """Whatever goes wrong inside is a ConfigError that names the backup."""
    try:
        yield
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
        raise ConfigError(f"{source}: cannot be read as a backup: {error}") from error


def _check_places(manifest: Manifest, places: dict[Entry, Path], force: bool, everywhere: bool) -> None:
    config, state = PurePosixPath(manifest.config).parent, PurePosixPath(manifest.state)
    folders = (config, state, state.parent / FOLDER)
    for entry in () if everywhere else places:
        if not any(PurePosixPath(entry.path).is_relative_to(folder) for folder in folders):
            raise ConfigError(
                f"{entry.path}: lies outside the folders of the configuration ({config}) and of the state ({state}); "
                "if it belongs to the station, --everywhere restores it"
            )
    there = sorted(str(path) for path in places.values() if os.path.lexists(path))
    if there and not force:
        raise ConfigError(f"{there[0]}: is there already ({len(there)} files in all); --force overwrites them")
    for name in there:
        if os.path.isdir(name) and not os.path.islink(name):
            raise ConfigError(f"{name}: is a folder where the backup has a file")


def _unpack(tar: tarfile.TarFile, manifest: Manifest, folder: Path, source: Path) -> None:
    """The files stand in the order in which the manifest names them."""
    for entry in manifest.files:
        head = tar.next()
        inner = tar.extractfile(head) if head is not None and head.isreg() and head.name == entry.member else None
        if head is None or inner is None:
            raise ConfigError(f"{source}: the entry {entry.path!r} is not one of a backup")
        if head.size > shutil.disk_usage(folder).free - _ROOM_LEFT:
            raise ConfigError(f"{folder.parent}: has no room for {entry.path}, {head.size >> 20} MiB")
        if _copy_out(inner, folder / entry.member) != entry.sha256:
            raise ConfigError(f"{source}: is damaged: {entry.path} has another checksum")
        tar.members.clear()  # type: ignore[attr-defined]  # or they would all be kept


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


@contextlib.contextmanager
def _numbers_used(state: Path) -> Iterator[int]:
    """Up to which number verdicts may have gone out from what stands there now, 0 where nothing does; no agent starts
    on it meanwhile."""
    used, folder = 0, None
    with contextlib.ExitStack() as stack:
        try:
            with contextlib.suppress(FileNotFoundError):
                folder = stack.enter_context(open_folder(state))
        except OSError as error:
            raise ConfigError(f"{state}: cannot be used: {error.strerror or error}") from error
        if folder is not None:
            _lock(stack, folder, state)
            if _stands(folder, NUMBER_MARK):
                mark = _open_mark(folder, state)
                used = max(mark.reserved, mark.floor)
                mark.close()
        yield used


def _lock(stack: contextlib.ExitStack, folder: int, state: Path) -> None:
    try:
        lock = open_in(folder, LOCK, os.O_RDWR, state / LOCK)
    except FileNotFoundError:
        return  # no agent has been here
    except OSError as error:
        raise ConfigError(f"{state}: cannot be used: {error.strerror or error}") from error
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{state}: an agent is running on it; stop it first") from error


def _stands(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_mark(folder: int, state: Path) -> NumberMark:
    file = state / NUMBER_MARK
    return NumberMark(file, lambda flags, mode: open_in(folder, file.name, flags, file, mode))


def _finish_state(state: Path, skipped: int, used: int, owner: tuple[int, int] | None) -> None:
    """No log of the journal that was there before. The next agent goes on above what was used by then, and announces
    the jump."""
    try:
        with open_folder(state) as folder:
            for suffix in BESIDE_JOURNAL:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{JOURNAL}{suffix}", dir_fd=folder)
            if not (skipped or used):
                return
            mark = _open_mark(folder, state)
            try:
                mark.jump(max(mark.reserved + skipped, used))
                if owner is not None:
                    os.fchown(mark.fileno(), *owner)
            finally:
                mark.close()
    except FileNotFoundError:
        return  # a backup from before the first start


def _owner(prefix: Path) -> tuple[int, int] | None:
    """The service's user and group on this machine, where we may give files away."""
    if os.geteuid() != 0 or prefix != Path("/"):
        return None
    try:
        user = pwd.getpwnam("flawline")
    except KeyError:
        return None
    return user.pw_uid, user.pw_gid


def _is_states(place: Path, state: Path) -> bool:
    """State and what was learnt belong to the service's user, and so do their folders."""
    return any(place.is_relative_to(folder) for folder in (state, state.parent / FOLDER))


def _put(source: Path, target: Path, entry: Entry, prefix: Path, owner: tuple[int, int] | None) -> None:
    """To this owner; else owner and group are those of the file that is overwritten; else, where we may, those of the
    same names. Raises ConfigError naming the file."""
    partial = f".flawline-{secrets.token_hex(8)}.partial"
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(open_folder(target.parent, make=True))
            descriptor = os.open(
                partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder
            )
            with os.fdopen(descriptor, "wb") as out, source.open("rb") as stream:
                stack.callback(_unlink, folder, partial)
                shutil.copyfileobj(stream, out)
                out.flush()
                _give(descriptor, folder, target, entry, prefix, owner)
                os.fchmod(descriptor, entry.mode)
            os.replace(partial, target.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be restored: {error.strerror or error}") from error


def _unlink(folder: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _give(
    descriptor: int, folder: int, target: Path, entry: Entry, prefix: Path, owner: tuple[int, int] | None
) -> None:
    try:
        there = os.stat(target.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        there = None
    if there is not None and stat.S_ISREG(there.st_mode):
        give(descriptor, there.st_uid, there.st_gid)
    elif os.geteuid() == 0 and prefix == Path("/"):
        with contextlib.suppress(KeyError):
            give(descriptor, -1, grp.getgrnam(entry.group).gr_gid)
        with contextlib.suppress(KeyError):
            give(descriptor, pwd.getpwnam(entry.owner).pw_uid, -1)
    if owner is not None:
        os.fchown(descriptor, *owner)


def _hand_over(places: Iterable[Path], state: Path, owner: tuple[int, int] | None) -> None:
    """The folders of the state: the inner ones first, as long as the outer ones are as they were."""
    if owner is None:
        return
    folders = {folder for place in places for folder in place.parents if _is_states(folder, state)}
    for path in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with open_folder(path) as folder:
            real = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
            try:
                os.fchown(real, *owner)
            finally:
                os.close(real)
