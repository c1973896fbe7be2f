"""One question of GigE Vision's control protocol, asked beside the library: is the camera there, and who holds it?"""

import contextlib
import socket
import struct

_PORT = 3956
_KEY, _ACK_REQUIRED, _READ, _READ_ACK = 0x42, 0x01, 0x0080, 0x0081
_TRIES = 4
_TRY_S = 0.5


def read_register(host: str, register: int) -> int | None:
    """The 32-bit register of the camera at that IP address; None where it answers, but refuses to tell.

    The library waits for a silent camera for many seconds and keeps its camera locked meanwhile; this takes two at
    most. Any application may read. Raises OSError (TimeoutError among them) where nobody answers.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.connect((host, _PORT))
        link.settimeout(_TRY_S)
        for number in range(1, _TRIES + 1):
            link.send(struct.pack(">BBHHHI", _KEY, _ACK_REQUIRED, _READ, 4, number, register))
            with contextlib.suppress(TimeoutError):
                answer = link.recv(64)
                if len(answer) >= 8:
                    status, command, _, _ = struct.unpack(">HHHH", answer[:8])
                    if status or command != _READ_ACK or len(answer) < 12:
                        return None
                    return int.from_bytes(answer[8:12], "big")
    raise TimeoutError(f"no answer from {host} within {_TRIES * _TRY_S:g} s")
