"""Questions in GigE Vision's control protocol, beside the library: is the camera there, who is it, who holds it?"""

import contextlib
import socket
import struct

_PORT = 3956
_KEY, _ACK_REQUIRED, _READ, _READ_MEMORY = 0x42, 0x01, 0x0080, 0x0084  # each is acknowledged by the number after it
_TRIES = 4
_TRY_S = 0.5


def read_register(host: str, register: int) -> int | None:
    """The 32-bit register of the camera at that IP address; None where it answers, but refuses to tell.

    The library waits for a silent camera for many seconds and keeps its camera locked meanwhile; this takes two at
    most. Any application may read. Raises OSError (TimeoutError among them) where nobody answers.
    """
    answer = _ask(host, _READ, struct.pack(">I", register))
    return int.from_bytes(answer[:4], "big") if answer is not None and len(answer) >= 4 else None


def read_memory(host: str, place: int, count: int) -> bytes | None:
    """`count` bytes, a multiple of four and 536 at most, as `read_register`."""
    answer = _ask(host, _READ_MEMORY, struct.pack(">IHH", place, 0, count))
    return answer[4 : 4 + count] if answer is not None and len(answer) >= 4 + count else None


def _ask(host: str, command: int, question: bytes) -> bytes | None:
    """What the acknowledgement carries; None where the camera refuses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.connect((host, _PORT))
        link.settimeout(_TRY_S)
        for number in range(1, _TRIES + 1):
            link.send(struct.pack(">BBHHH", _KEY, _ACK_REQUIRED, command, len(question), number) + question)
            with contextlib.suppress(TimeoutError):
                answer = link.recv(1024)
                if len(answer) >= 8:
                    status, acknowledged, _, _ = struct.unpack(">HHHH", answer[:8])
                    return None if status or acknowledged != command + 1 else answer[8:]
    raise TimeoutError(f"no answer from {host} within {_TRIES * _TRY_S:g} s")
