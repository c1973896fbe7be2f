"""A network of GigE Vision cameras that answer discovery and tell their registers, some of them silent after that."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from flawline.camera.camera import Camera
from flawline.camera.genicam import _discover, list_devices
from flawline.camera.gvcp import read_memory, read_register
from flawline.config.errors import CameraError

PORT = 3956
DISCOVERY, READ, READ_MEMORY = 0x0002, 0x0080, 0x0084
CONTROL, SERIAL = 0x0A00, 0x00D8


class Network:
    """Cameras at 127.0.0.11, .12, ...; a station on the loopback interface finds them by their common answerer."""

    def __init__(self, *silent: int, count: int) -> None:
        self.asked: list[int] = []
        self._silent = silent
        self._count = count
        self._over = threading.Event()
        addresses = ["127.0.0.1", *(f"127.0.0.{10 + number}" for number in range(1, count + 1))]
        self._links = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in addresses]
        for link, address in zip(self._links, addresses, strict=True):
            link.bind((address, PORT))
            link.settimeout(0.1)
        self._threads = [threading.Thread(target=self._serve, args=pair) for pair in enumerate(self._links)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, number: int, link: socket.socket) -> None:
        """Number 0 answers discovery, for all; the others are asked one by one."""
        with link:
            while not self._over.is_set():
                try:
                    request, whence = link.recvfrom(1024)
                except TimeoutError:
                    continue
                _, _, command, _, identity = struct.unpack(">BBHHH", request[:8])
                if number == 0 and command == DISCOVERY:
                    for one in range(1, self._count + 1):
                        link.sendto(struct.pack(">HHHH", 0, 3, 248, identity) + self._bootstrap(one), whence)
                elif number and number not in self._silent:
                    self.asked.append(number)
                    (place,) = struct.unpack(">I", request[8:12])
                    if command == READ_MEMORY:
                        answer = request[8:12] + self._bootstrap(number)[SERIAL : SERIAL + 32].ljust(32, b"\0")
                    else:
                        answer = struct.pack(">I", 2 if place == CONTROL and number == 2 else 0)
                    link.sendto(struct.pack(">HHHH", 0, command + 1, len(answer), identity) + answer, whence)

    def _bootstrap(self, number: int) -> bytes:
        """The first registers, as discovery sends them."""
        head = bytearray(248)
        struct.pack_into(">HH", head, 0, 1, 2)
        head[10:16] = bytes([0, 0x30, 0x53, 0, 0, number])
        head[36:40] = socket.inet_aton(f"127.0.0.{10 + number}")
        head[72:76], head[104:109] = b"Acme", b"Model"
        head[SERIAL : SERIAL + 3] = f"SN{number}".encode()
        head[SERIAL + 16 : SERIAL + 21] = f"user{number}".encode()
        return bytes(head)


@pytest.fixture
def network() -> Iterator[Callable[..., Network]]:
    started: list[Network] = []

    def start(*silent: int, count: int) -> Network:
        started.append(Network(*silent, count=count))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_silent_cameras_do_not_add_up(network: Callable[..., Network]) -> None:
    network(3, 4, 5, 6, count=6)
    began = time.monotonic()
    devices = {device.address: device for device in list_devices()}
    assert time.monotonic() - began < 6  # one after the other: 8 s and more
    assert (devices["127.0.0.11"].serial, devices["127.0.0.11"].user_name) == ("SN1", "user1")
    assert [devices[f"127.0.0.{10 + number}"].access for number in (1, 2, 3)] == [
        "free",
        "held by another application",
        "",
    ]
    with pytest.raises(TimeoutError):
        read_register("127.0.0.13", CONTROL)
    assert read_memory("127.0.0.12", SERIAL, 32) == b"SN2".ljust(16, b"\0") + b"user2".ljust(16, b"\0")


def test_the_one_that_is_meant_is_not_kept_waiting_by_the_others(
    network: Callable[..., Network], camera: Callable[..., Camera]
) -> None:
    network(1, 3, count=3)
    began = time.monotonic()
    found = [device for device, _ in _discover(details=True, serial="SN2")]
    assert time.monotonic() - began < 2.4  # the silent ones are given up after 2 s and discovery
    assert [device.serial for device in found] == ["", "SN2", ""]
    with pytest.raises(CameraError, match=r"no genicam camera answers with serial = 'SN9'; .*serial SN2"):
        camera("genicam", serial="SN9").open()
