"""The examples are run as a user would: the C subscriber is compiled, the PLC gateway is read by a Modbus client."""

import runpy
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import zmq
from needs import need
from station import CLI, Make, free_port

from flawline.agent.control import ask
from flawline.agent.security import make_keys
from flawline.agent.verdict import Reason
from flawline.agent.wire import pack

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_gateway_has_a_number_for_every_reason() -> None:
    assert set(runpy.run_path(str(EXAMPLES / "plc_gateway.py"))["REASONS"]) == set(get_args(Reason))


def test_the_c_subscriber_is_gapless_over_a_restart_and_notices_a_new_count(make_station: Make, tmp_path: Path) -> None:
    need(shutil.which("cc"), "cc (Debian's gcc and libc6-dev)")
    need(list(Path("/usr/include").rglob("zmq.h")), "zmq.h (Debian's libzmq3-dev)")
    program = tmp_path / "subscriber"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", program, EXAMPLES / "subscriber.c", "-lzmq"], check=True, timeout=120)
    station = make_station({"top": [("good", 0), ("bad", 0), ("unreadable", 0)]}).start()
    with (tmp_path / "out").open("w") as out, (tmp_path / "errors").open("w") as errors:
        reader = subprocess.Popen([program, station.publish, station.control, "7"], stdout=out, stderr=errors)
    station.wait_for(lambda: "gapless from seq=1 on" in (tmp_path / "errors").read_text())
    station.trigger("top", *"ABC")
    station.until("verdict", 3)
    station.kill()
    station.start()
    station.trigger("top", *"DEF")
    station.wait_for(lambda: "seq=6" in (tmp_path / "out").read_text())
    station.stop()
    shutil.rmtree(station.folder / "state")
    station.start()
    station.trigger("top", "G")
    assert reader.wait(120) == 0
    lines = [line.removesuffix(" (replayed)") for line in (tmp_path / "out").read_text().splitlines()]
    answers = ["result=pass reason=-", "result=fail reason=-", "result=error reason=bad_frame"] * 3
    assert lines == [
        f"seq={number} camera=top trigger_id={name} {answer}"
        for number, name, answer in zip([*range(1, 7), 1], "ABCDEFG", answers[:7], strict=True)
    ]
    assert "counts anew: had 6" in (tmp_path / "errors").read_text()
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

    def until(self, true: Callable[[list[int]], bool], limit_s: float = 30.0) -> list[int]:
        end = time.monotonic() + limit_s
        while not true(values := self.read()):
            assert time.monotonic() < end, values
            time.sleep(0.05)
        return values

    def read_verdict(self) -> list[int]:
        return self.until(lambda values: values[3] != 0)

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
    plc.until(lambda values: values[1] == 1)
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
    still = plc.until(lambda values: values[1] == 0)[0]
    time.sleep(0.5)
    assert plc.read()[0] == still


def test_a_plc_is_told_that_verdicts_are_missing(tmp_path: Path, gateways: list[subprocess.Popen[bytes]]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    out = context.socket(zmq.PUB)
    publish, port = out.bind_to_random_port("tcp://127.0.0.1"), free_port()
    status = {"boot_id": "a", "cameras": {}, "state": "running", "control": f"tcp://127.0.0.1:{free_port()}"}
    judged = {"station": "line1", "camera": "top", "result": "pass", "reason": None, "defects": [], "score": 0.1}

    def say(last_seq: int) -> None:
        out.send_multipart([b"status/line1/", pack(status | {"last_seq": last_seq})])

    def verdict(seq: int) -> None:
        out.send_multipart([b"verdict/line1/top/", pack(judged | {"seq": seq, "camera_seq": seq})])

    def said(last_seq: int, true: Callable[[list[int]], bool]) -> Callable[[list[int]], bool]:
        def check(values: list[int]) -> bool:
            say(last_seq)
            return true(values)

        return check

    command = [sys.executable, str(EXAMPLES / "plc_gateway.py"), "--publish", f"tcp://127.0.0.1:{publish}"]
    command += ["--listen", f"127.0.0.1:{port}", "--state", str(tmp_path / "acknowledged")]
    gateways.append(subprocess.Popen(command))
    try:
        plc = Plc(port)
        plc.until(said(0, lambda values: values[1] == 1))
        verdict(1)
        plc.until(said(1, lambda values: values[3] == 1))
        plc.acknowledge(1)
        for seq in (3, 4):  # 2 is lost on its way
            verdict(seq)
        still = plc.until(said(4, lambda values: values[1] == 5))
        for _ in range(50):  # longer than one attempt at a replay takes
            say(4)
            assert plc.read() == still
            time.sleep(0.1)
        assert still[2:5] == [0, 0, 0]  # 3 and 4 wait for 2
        plc.until(lambda values: values[1] == 0)  # a station that falls silent is told meanwhile, too
    finally:
        context.destroy(linger=0)


def test_a_gateway_with_keys(make_station: Make, tmp_path: Path, gateways: list[subprocess.Popen[bytes]]) -> None:
    server_secret, server_public = make_keys(tmp_path / "keys", "server")
    secret, public = make_keys(tmp_path / "keys", "plc")
    (tmp_path / "clients").mkdir()
    public.rename(tmp_path / "clients" / "plc.public")
    station = make_station({"top": [("good", 0)]})
    keyed = f'[publish]\ncurve_secret = "{server_secret}"\ncurve_clients = "{tmp_path / "clients"}"\n'
    station.config.write_text(station.config.read_text().replace("[publish]\n", keyed))
    engine = ["--set", "worker.engine=flawline.models.noop:NoopEngine"]
    with station.log.open("w") as log:
        station.process = subprocess.Popen([*CLI, "run", "--config", str(station.config), *engine], stderr=log)
    port = free_port()
    command = [sys.executable, str(EXAMPLES / "plc_gateway.py"), "--publish", station.publish]
    command += ["--listen", f"127.0.0.1:{port}", "--state", str(tmp_path / "acknowledged")]
    for options in (["--server-key", server_public], ["--server-key", server_public, "--client-key", public]):
        refused = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2
        assert "key" in refused.stderr.splitlines()[-1]
    command += ["--server-key", str(server_public), "--client-key", str(secret)]
    gateways.append(subprocess.Popen(command))
    Plc(port).until(lambda values: values[1] == 1, 60)

    def trigger(name: str) -> None:
        request = {"cmd": "trigger", "id": 1, "camera": "top", "trigger_id": name}
        ask(station.control, request, 20.0, (server_public, secret))

    trigger("A")
    plc = Plc(port)
    plc.until(lambda values: values[3:5] == [1, 2])
    plc.acknowledge(1)
    gateways[0].kill()
    gateways[0].wait(10)
    trigger("B")  # comes by replay, over the keyed control socket
    gateways.append(subprocess.Popen(command))
    Plc(port).until(lambda values: values[3:5] == [2, 2])
    station.stop()
