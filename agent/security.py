"""CURVE: key files, which clients may connect, and the refusal to be reached from other machines without it."""

import asyncio
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
import zmq
import zmq.asyncio
from zmq.utils import z85

from flawline.agent.endpoint import is_loopback
from flawline.config.errors import ConfigError
from flawline.config.settings import ControlSettings, PublishSettings

log = structlog.get_logger()
_Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
_MAX_CLIENT_FILES = 1000
_CLIENT = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # goes over the wire as the client's name


def read_key(file: Path, kind: str, name: str) -> bytes:
    """A Z85 key of 40 characters: the file's only line, or its `public-key = "..."` or `secret-key = "..."`.

    `name` stands in the error: the settings key or option that named the file. Raises ConfigError.
    """
    try:
        text = file.read_text(encoding="ascii")
        status = file.stat()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: {file} cannot be read: {error}") from error
    if kind == "secret" and (fault := _is_open(status)):
        raise ConfigError(f"{name}: {file} can be {fault} on this machine: chmod 600 {file}")
    found = re.search(rf'{kind}-key\s*=\s*"({_Z85})"', text) or re.fullmatch(rf"({_Z85})\s*", text)
    if found is None:
        raise ConfigError(f"{name}: {file} holds no CURVE {kind} key; `flawline keys` makes one")
    return found.group(1).encode()


def _is_open(status: os.stat_result) -> str | None:
    """To whom else. A group may read what is root's: systemd hands credentials over so, and an administrator may."""
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "changed by others"
    if status.st_mode & stat.S_IROTH:
        return "read by everybody"
    return "read by a group" if status.st_mode & stat.S_IRGRP and status.st_uid != 0 else None


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name.secret` (mode 0600) and `name.public` (0644) into `folder`. Existing files are not overwritten.

    Raises ConfigError also for a name that a doorkeeper would not take.
    """
    if not _CLIENT.fullmatch(name):
        raise ConfigError(f"{name!r}: a key's name has letters, digits, '_', '.' and '-', 64 at most")
    public, secret = zmq.curve_keypair()
    files = (folder / f"{name}.secret", folder / f"{name}.public")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file, mode, text in (
            (files[0], 0o600, f'curve\n    public-key = "{public.decode()}"\n    secret-key = "{secret.decode()}"\n'),
            (files[1], 0o644, f'curve\n    public-key = "{public.decode()}"\n'),
        ):
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as out:
                out.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename}: is there already; keys are not overwritten") from error
    except OSError as error:
        raise ConfigError(f"{folder}: keys cannot be written: {error.strerror or error}") from error
    return files


def is_local(endpoint: str) -> bool:
    """True where no other machine reaches the address of a ZeroMQ socket."""
    parts = urlsplit(endpoint)
    return parts.scheme in ("ipc", "inproc") or is_loopback(parts.hostname or "")


@dataclass(frozen=True)
class Curve:
    """One socket's server side."""

    section: str  # `publish` or `control`; also the ZAP domain
    secret: bytes
    clients: Path

    @staticmethod
    def files(
        section: str, settings: PublishSettings | ControlSettings, fallback: PublishSettings | None = None
    ) -> tuple[Path, Path] | None:
        """The secret and the clients' folder that the settings name; neither is looked at.

        Raises ConfigError where they leave a socket open to other machines.
        """
        secret = settings.curve_secret or (fallback.curve_secret if fallback else None)
        clients = settings.curve_clients or (fallback.curve_clients if fallback else None)
        if secret is None and clients is None:
            if not (is_local(settings.endpoint) or settings.insecure):
                raise ConfigError(
                    f"{section}.endpoint = {settings.endpoint!r} is reached from other machines: set "
                    f"{section}.curve_secret and {section}.curve_clients (see `flawline keys`), or insecure = true"
                )
            return None
        if secret is None or clients is None:
            missing = "curve_secret" if secret is None else "curve_clients"
            raise ConfigError(f"{section}.{missing}: CURVE needs curve_secret and curve_clients both")
        return secret, clients

    @classmethod
    def of(
        cls, section: str, settings: PublishSettings | ControlSettings, fallback: PublishSettings | None = None
    ) -> "Curve | None":
        """What the settings ask for. Raises ConfigError as `files` does, and where the files are not as they should."""
        files = cls.files(section, settings, fallback)
        if files is None:
            return None
        secret, clients = files
        if not clients.is_dir():
            raise ConfigError(f"{section}.curve_clients: {clients} is not a folder")
        return cls(section, read_key(secret, "secret", f"{section}.curve_secret"), clients)

    def guard(self, socket: zmq.Socket[Any]) -> None:
        """To be called before bind: only clients whose keys lie in the folder get a connection."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, self.section)


def connect_curve(socket: zmq.Socket[bytes], server_key: Path, client_key: Path) -> None:
    """A client's side: the server's public key and the client's own secret key file, before connect."""
    secret = read_key(client_key, "secret", str(client_key))
    socket.setsockopt(zmq.CURVE_SERVERKEY, read_key(server_key, "public", str(server_key)))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


class Doorkeeper:
    """Answers ZeroMQ's question, at each handshake, whether a client's key lies in the folder (ZAP, RFC 27)."""

    def __init__(self, context: zmq.asyncio.Context, doors: Mapping[str, Path]) -> None:
        self._doors = doors
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")

    async def serve(self) -> None:
        """Answer until cancelled."""
        while True:
            version, request, *asked = await self._socket.recv_multipart()
            try:
                name = await self._admitted(asked)
            except Exception:  # whatever is wrong with one client's, the others' handshakes go on
                log.exception("handshake_failed")
                name = None
            status = (b"200", b"OK", name.encode()) if name else (b"400", b"this key is not allowed", b"")
            await self._socket.send_multipart([version, request, *status, b""])

    async def _admitted(self, asked: list[bytes]) -> str | None:
        """The name of the client that asks; None where it is none of ours."""
        domain, address, _identity, mechanism, *credentials = asked
        name = None
        folder = self._doors.get(domain.decode(errors="replace"))
        if mechanism == b"CURVE" and len(credentials) == 1 and folder is not None:
            name = await asyncio.get_running_loop().run_in_executor(
                None, self._whose, folder, z85.encode(credentials[0])
            )
        if name is None:
            log.warning(
                "client_refused", socket=domain.decode(errors="replace"), address=address.decode(errors="replace")
            )
        return name

    @staticmethod
    def _whose(folder: Path, key: bytes) -> str | None:
        """The name of the file that holds this public key; files that hold none are passed over."""
        for file in sorted(folder.glob("*.public"))[:_MAX_CLIENT_FILES]:
            if not _CLIENT.fullmatch(file.stem):
                log.warning("client_key_left_out", file=str(file), reason="letters, digits, '_', '.' and '-' in a name")
                continue
            try:
                if read_key(file, "public", str(file)) == key:
                    return file.stem
            except ConfigError as error:
                log.warning("client_key_unreadable", error=str(error))
        return None

    def close(self) -> None:
        """No more handshakes."""
        self._socket.close()
