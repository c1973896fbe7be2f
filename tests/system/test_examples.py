"""The examples are run as a user would: the C subscriber is compiled, the PLC gateway is read by a Modbus client."""

import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import need
from station import Make, free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_c_subscriber_is_gapless_over_a_restart(make_station: Make, tmp_path: Path) -> None:
    need(shutil.which("cc"), "cc (Debian's gcc and libc6-dev)")
    need(list(Path("/usr/include").rglob("zmq.h")), "zmq.h (Debian's libzmq3-dev)")
    program = tmp_path / "subscriber"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", program, EXAMPLES / "subscriber.c", "-lzmq"], check=True, timeout=120)
    station = make_station({"top": [("good", 0), ("bad", 0), ("unreadable", 0)]}).start()
    with (tmp_path / "out").open("w") as out, (tmp_path / "errors").open("w") as errors:
        reader = subprocess.Popen([program, station.publish, station.control, "6"], stdout=out, stderr=errors)
    station.wait_for(lambda: "gapless from seq=1 on" in (tmp_path / "errors").read_text())
    station.trigger("top", *"ABC")
    station.until("verdict", 3)
    station.kill()
    station.start()
    station.trigger("top", *"DEF")
    assert reader.wait(120) == 0
    lines = [line.removesuffix(" (replayed)") for line in (tmp_path / "out").read_text().splitlines()]
    answers = ["result=pass reason=-", "result=fail reason=-", "result=error reason=bad_frame"] * 2
    assert lines == [
        f"seq={number} camera=top trigger_id={name} {answer}"
        for number, name, answer in zip(range(1, 7), "ABCDEF", answers, strict=True)
    ]
    station.stop()


class Plc:
    """A Modbus/TCP client."""

    def __init__(self, port: int) -> None:
        end = time.monotonic() + 30
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port), 10)
                return
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)

    def ask(self, body: bytes) -> bytes:
        self.socket.sendall(struct.pack(">HHHB", 7, 0, len(body) + 1, 1) + body)
        head = self.socket.recv(7, socket.MSG_WAITALL)
        return self.socket.recv(struct.unpack(">HHHB", head)[2] - 1, socket.MSG_WAITALL)

    def read(self) -> list[int]:
        reply = self.ask(struct.pack(">BHH", 3, 0, 11))
        assert reply[:2] == bytes([3, 22])
        return list(struct.unpack(">11H", reply[2:]))

    def read_verdict(self, limit_s: float = 30.0) -> list[int]:
        end = time.monotonic() + limit_s
        while not (values := self.read())[3]:
            assert time.monotonic() < end
            time.sleep(0.05)
        return values

    def acknowledge(self, seq: int) -> None:
        assert self.ask(struct.pack(">BHHBHH", 16, 8, 2, 4, seq >> 16, seq & 0xFFFF)) == struct.pack(">BHH", 16, 8, 2)


@pytest.fixture
def gateways() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait(10)


def test_a_plc_takes_each_verdict_once(
    make_station: Make, tmp_path: Path, gateways: list[subprocess.Popen[bytes]]
) -> None:
    station = make_station({"top": [("good", 0), ("bad", 0), ("unreadable", 0), ("good", 0)]}).start()
    port = free_port()
    command = [sys.executable, str(EXAMPLES / "plc_gateway.py"), "--publish", station.publish]
    command += ["--listen", f"127.0.0.1:{port}", "--state", str(tmp_path / "acknowledged")]
    gateways.append(subprocess.Popen(command))
    plc = Plc(port)
    end = time.monotonic() + 30
    while plc.read()[1] != 1:
        assert time.monotonic() < end
    station.trigger("top", *"ABC")
    first = plc.read_verdict()
    assert first[2:8] == [0, 1, 1, 0, 0, 1000]
    plc.acknowledge(9)  # not the one shown
    assert plc.read()[3] == 1
    plc.acknowledge(1)
    assert plc.read_verdict()[3:7] == [2, 2, 0, 1]
    time.sleep(0.3)
    assert plc.read()[0] != first[0]
    gateways[0].kill()  # before the second is acknowledged
    gateways[0].wait(10)
    station.trigger("top", "D")
    gateways.append(subprocess.Popen(command))
    plc = Plc(port)
    seen = []
    for seq in (2, 3, 4):
        values = plc.read_verdict()
        assert values[3] == seq
        seen.append(values[4:6])
        plc.acknowledge(seq)
    assert seen == [[2, 0], [3, 6], [1, 0]]
    assert plc.ask(struct.pack(">BHH", 3, 5, 9)) == bytes([0x83, 2])
    assert plc.ask(struct.pack(">BHH", 6, 4, 1)) == bytes([0x86, 2])
    assert plc.ask(b"\x2b") == bytes([0xAB, 1])
    station.kill()
    end = time.monotonic() + 30
    while plc.read()[1] != 0:
        assert time.monotonic() < end
    still = plc.read()[0]
    time.sleep(0.5)
    assert plc.read()[0] == still
