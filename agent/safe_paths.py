"""Files in folders that are not root's alone, opened by root without being led elsewhere.

Whoever owns a folder decides what its names lead to: the service's user could put a link to `/etc/shadow` where a file
of the station was. Root therefore goes from folder to folder by descriptors, and follows a link only where root made
it, in a folder that nobody else changes, and only as long as every folder on the way was one. Any other user follows
links as ever: there is nothing to win from him that the owner of such a folder could not have without him.
"""

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from flawline.config.errors import ConfigError

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would keep us waiting
_MOST_LINKS = 40  # as the kernel has it


@contextlib.contextmanager
def open_folder(path: Path, *, make: bool = False) -> Iterator[int]:
    """A descriptor for `dir_fd`; `make`: folders that are missing are made.

    Raises OSError, and ConfigError naming a link that is not followed.
    """
    outer, name = _walk(path, make=make, follow=True)
    try:
        inner = _enter(outer, name, make=make)
    finally:
        os.close(outer)
    try:
        yield inner
    finally:
        os.close(inner)


@contextlib.contextmanager
def open_file(path: Path, *, follow: bool = True) -> Iterator[int]:
    """A regular file to be read; `follow`: also by a link that may be followed. Errors as `open_folder` has them, and
    ConfigError where it is something else than a file."""
    folder, name = _walk(path, make=False, follow=follow)
    try:
        descriptor = open_in(folder, name, os.O_RDONLY, path)
    finally:
        os.close(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_in(folder: int, name: str, flags: int, path: Path, mode: int = 0o640) -> int:
    """A regular file in an open folder, never by a link; the path is for the error: OSError or ConfigError."""
    try:
        descriptor = os.open(name, flags | _FILE, mode, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: is a link where a file belongs") from error
        if error.errno == errno.ENXIO:
            raise ConfigError(f"{path}: is not a file") from error
        raise
    status, around = os.fstat(descriptor), os.fstat(folder)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path}: is not a file")
    if os.geteuid() == 0 and around.st_uid not in (0, status.st_uid) and status.st_nlink > 1:
        os.close(descriptor)
        raise ConfigError(f"{path}: is another user's file, which has a second name here")
    return descriptor


def _walk(path: Path, *, make: bool, follow: bool) -> tuple[int, str]:
    """The folder in which the last name of the path stands, when links are followed as they may be, and that name."""
    ahead = [*reversed(path.absolute().parts[1:])]
    folder, ours, links = os.open("/", _FOLDER), True, 0
    try:
        while True:
            name = ahead.pop() if ahead else "."
            ours = ours and _is_roots(os.fstat(folder))
            if (follow or ahead) and (there := _status(folder, name)) and stat.S_ISLNK(there.st_mode):
                if os.geteuid() == 0 and not (ours and there.st_uid == 0):
                    raise ConfigError(f"{path}: {name!r} is a link in a folder that is not root's; root follows none")
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                target = Path(os.readlink(name, dir_fd=folder))
                ahead += [part for part in reversed(target.parts) if part != "/"]
                if target.is_absolute():
                    os.close(folder)
                    folder = os.open("/", _FOLDER)
            elif not ahead:
                return folder, name
            else:
                outer, folder = folder, _enter(folder, name, make=make)
                os.close(outer)
    except BaseException:
        os.close(folder)
        raise


def _status(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _enter(folder: int, name: str, *, make: bool) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
    return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)


def _is_roots(folder: os.stat_result) -> bool:
    """Nobody else changes what is in it; in a sticky one, as /tmp, what is root's stays so."""
    by_others = folder.st_mode & stat.S_IWOTH or (folder.st_mode & stat.S_IWGRP and folder.st_gid != 0)
    return folder.st_uid == 0 and (not by_others or bool(folder.st_mode & stat.S_ISVTX))


def own_ground(path: Path) -> Path:
    """The nearest folder that is there, on the way to the path, in which nobody but us changes what we put there."""
    real = Path(os.path.realpath(path))
    best = Path("/")
    for folder in (*reversed(real.parents), real):
        if not folder.is_dir() or (os.geteuid() == 0 and not _is_roots(folder.stat())):
            break
        best = folder
    return best


@contextlib.contextmanager
def as_owner_of(path: Path) -> Iterator[None]:
    """Root becomes the user whose folder it is, for what opens files by name on its own, as SQLite does.

    Where the folder is root's but lies in one of another user, that user. Raises as `open_folder` does.
    """
    others = [owner for place in (*reversed(path.parents), path) if (owner := _owner(place))[0] != 0]
    if os.geteuid() != 0 or not others:
        yield
        return
    innermost = _owner(path)
    uid, gid = innermost if innermost[0] != 0 else others[0]
    before = os.getegid(), os.getgroups()
    with contextlib.suppress(KeyError):
        gid = pwd.getpwuid(uid).pw_gid
    try:
        os.setgroups([])
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(before[0])
        os.setgroups(before[1])


def _owner(folder: Path) -> tuple[int, int]:
    with open_folder(folder) as descriptor:
        status = os.fstat(descriptor)
    return status.st_uid, status.st_gid
