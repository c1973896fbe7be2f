"""Where a socket of the agent is bound, and who reaches it there. Of socket files ZeroMQ takes no care: it binds over
one that is in use, and leaves its own behind."""

import errno
import ipaddress
import re
import socket
from pathlib import Path
from typing import Any

import zmq

from flawline.config.errors import ConfigError, FlawlineError

_INTERFACE = re.compile(r"[A-Za-z][\w.-]{0,14}")  # what Linux calls one; ZeroMQ has ENODEV for all that it cannot read


class Endpoint:
    """A bound socket's address. Raises ConfigError, naming the key, where it cannot be bound or is another's;
    FlawlineError where this machine has had it and lost it again."""

    def __init__(self, bound: "zmq.Socket[Any]", address: str, key: str) -> None:
        transport, _, path = address.partition("://")
        self._file = Path(path) if transport == "ipc" and not path.startswith("@") else None  # `@`: it has no file
        try:
            if self._file is not None and _answers(self._file):
                raise ConfigError(f"{key}: {address} cannot be bound: Address already in use")
            bound.setsockopt(zmq.IPV6, has_ipv6(address))
            bound.bind(address)
        except zmq.ZMQError as error:
            bound.close(0)
            kind = FlawlineError if may_come(error.errno, address) else ConfigError
            raise kind(f"{key}: {address} cannot be bound: {error}") from error
        except ConfigError:
            bound.close(0)
            raise
        self._inode = _inode(self._file)

    def remove_file(self) -> None:
        """To be called once the socket is closed. A file that another program has put in its place stays."""
        if self._file is not None and self._inode is not None and _inode(self._file) == self._inode:
            self._file.unlink(missing_ok=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host, given by address or name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_ipv6(address: str) -> bool:
    """Whether it is written with an address of IPv6; names stay those of IPv4, as ZeroMQ has it by default."""
    return address.startswith("tcp://[")


def may_come(number: int | None, address: str) -> bool:
    """Whether ZeroMQ's error says of a `tcp://` address only that this machine does not have it now."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    return number == errno.EADDRNOTAVAIL or (number == errno.ENODEV and _INTERFACE.fullmatch(host) is not None)


def _answers(file: Path) -> bool:
    """Whether somebody listens there; a file that a killed program left behind is in nobody's use."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(file))
        except OSError:
            return False
    return True


def _inode(file: Path | None) -> int | None:
    try:
        return None if file is None else file.stat().st_ino
    except OSError:
        return None
