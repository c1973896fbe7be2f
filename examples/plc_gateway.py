"""A gateway from flawline to a PLC: verdicts as Modbus/TCP holding registers, one after the other, each acknowledged.

    python examples/plc_gateway.py --publish tcp://127.0.0.1:5555 --listen 127.0.0.1:1502 --state acknowledged

register  holds
0         heartbeat: goes on counting while verdicts can come; if it stands still, treat every part as a reject
1         station: 0 not heard, 1 running, 2 degraded, 3 paused, 4 starting or stopping; 5: it is heard, but verdicts
          are missing that its control port does not give. Later ones wait for them, and the heartbeat stands still
2, 3      number (seq) of the verdict shown, high word first; 0 while there is none
4         result: 0 none, 1 pass, 2 fail, 3 error. Only 1 lets a part through
5         reason of an error: its place in REASONS below, from 1; 0 none
6         how many defects
7         score x 10000; 65535 where there is none
8, 9      the PLC writes the number of the verdict that it has taken; then the next one is shown
10        verdicts that wait behind the one shown

The acknowledged number is kept in the file --state, so that a restarted gateway goes on with the next verdict, and
what was published meanwhile comes out of the station's journal: the PLC sees every verdict once, in order. For that
the station's control port must be reached from here; the station's status names it. Where the station demands CURVE,
give --server-key and --client-key, as to `flawline subscribe`.
"""

import argparse
import os
import socketserver
import struct
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from flawline.agent.subscriber import Subscriber
from flawline.config.errors import ConfigError

REASONS = (
    *("deadline", "overrun", "worker_lost", "out_of_memory", "camera_fault"),
    *("bad_frame", "agent_restart", "paused", "internal"),
)
RESULTS = {"pass": 1, "fail": 2, "error": 3}
STATES = {"running": 1, "degraded": 2, "paused": 3, "starting": 4, "stopping": 4}
HELD_BACK = 5
MOST_WAITING = 1000
"""Then no more is read from the station; its journal keeps them."""


class Registers:
    """The eleven registers, and the verdicts behind them."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._waiting: deque[dict[str, Any]] = deque()
        self.heartbeat = 0
        self.station = 0
        self.acknowledged = int(state.read_text()) if state.exists() else None

    @property
    def full(self) -> bool:
        """The PLC is far behind."""
        return len(self._waiting) >= MOST_WAITING

    def add(self, verdict: dict[str, Any]) -> None:
        """One more verdict to show."""
        with self._lock:
            self._waiting.append(verdict)

    def read(self) -> list[int]:
        """All of them, taken at one moment."""
        with self._lock:
            shown = self._waiting[0] if self._waiting else {"seq": 0, "result": None, "reason": None, "defects": []}
            score = shown.get("score")
            reason = shown["reason"]
            return [
                self.heartbeat,
                self.station,
                *_words(shown["seq"]),
                RESULTS.get(shown["result"], 0),
                REASONS.index(reason) + 1 if shown["result"] == "error" and reason in REASONS else 0,
                min(len(shown["defects"]), 0xFFFF),
                0xFFFF if score is None else round(score * 10000),
                *_words(self.acknowledged or 0),
                max(0, len(self._waiting) - 1),
            ]

    def acknowledge(self, number: int) -> None:
        """The PLC has taken the verdict shown; any other number is passed over."""
        with self._lock:
            if self._waiting and self._waiting[0]["seq"] & 0xFFFFFFFF == number:
                seq = self._waiting[0]["seq"]
                part = self._state.with_suffix(".part")
                part.write_text(str(seq))
                os.replace(part, self._state)
                self.acknowledged = seq
                self._waiting.popleft()


def _words(number: int) -> tuple[int, int]:
    return number >> 16 & 0xFFFF, number & 0xFFFF


class Modbus(socketserver.StreamRequestHandler):
    """One PLC's connection: functions 3 (read holding registers), 6 and 16 (write)."""

    registers: Registers

    def setup(self) -> None:
        """A PLC that says nothing for a minute is gone."""
        self.request.settimeout(60)
        super().setup()
        self._half = 0

    def handle(self) -> None:
        """Answer until the PLC hangs up."""
        try:
            while len(head := self.rfile.read(7)) == 7:
                transaction, protocol, length, unit = struct.unpack(">HHHB", head)
                if protocol != 0 or not 2 <= length <= 254:
                    return
                body = self.rfile.read(length - 1)
                if len(body) < length - 1:
                    return
                reply = self._answer(body)
                self.wfile.write(struct.pack(">HHHB", transaction, 0, len(reply) + 1, unit) + reply)
        except OSError:
            return

    def _answer(self, body: bytes) -> bytes:
        function = body[0]
        values = self.registers.read()
        try:
            if function == 3:
                first, count = struct.unpack(">HH", body[1:])
                if count < 1 or first + count > len(values):
                    return bytes([function | 0x80, 2])  # illegal address
                return struct.pack(f">BB{count}H", function, 2 * count, *values[first : first + count])
            if function == 6:
                first, value = struct.unpack(">HH", body[1:])
                return body if self._write(first, [value]) else bytes([function | 0x80, 2])
            if function == 16:
                first, count, _ = struct.unpack(">HHB", body[1:6])
                written = self._write(first, list(struct.unpack(f">{count}H", body[6:])))
                return body[:5] if written else bytes([function | 0x80, 2])
        except struct.error:
            return bytes([function | 0x80, 3])  # illegal value
        return bytes([function | 0x80, 1])  # illegal function

    def _write(self, first: int, values: list[int]) -> bool:
        """Only 8 and 9 can be written: both at once, or 8 and then 9."""
        if first == 8 and len(values) == 2:
            self.registers.acknowledge(values[0] << 16 | values[1])
        elif first == 8 and len(values) == 1:
            self._half = values[0]
        elif first == 9 and len(values) == 1:
            self.registers.acknowledge(self._half << 16 | values[0])
        else:
            return False
        return True


class Server(socketserver.ThreadingTCPServer):
    """Any number of PLCs may read; they share one acknowledgement."""

    allow_reuse_address = True
    daemon_threads = True


def connect(options: argparse.Namespace, start: int | None) -> Subscriber:
    """To the station; `start` is the first verdict to show. Raises ConfigError where a key file is no good."""
    if (options.server_key is None) != (options.client_key is None):
        raise ConfigError("--server-key and --client-key: CURVE needs both")
    keys = (options.server_key, options.client_key) if options.server_key is not None else None
    return Subscriber(options.publish, options.topic, from_seq=start, keys=keys)


def main() -> None:
    """Carry verdicts until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", default="tcp://127.0.0.1:5555")
    parser.add_argument("--topic", default="verdict/", help="verdict/STATION/CAMERA/ for one camera")
    parser.add_argument("--server-key", type=Path, help="CURVE: file with the station's public key")
    parser.add_argument("--client-key", type=Path, help="CURVE: file with our own secret key")
    parser.add_argument("--listen", default="127.0.0.1:1502")
    parser.add_argument("--state", type=Path, default=Path("acknowledged"))
    options = parser.parse_args()
    registers = Registers(options.state)
    Modbus.registers = registers
    host, _, port = options.listen.rpartition(":")
    start = None if registers.acknowledged is None else registers.acknowledged + 1
    try:
        line = connect(options, start)
    except ConfigError as error:
        parser.error(str(error))
    state = 0
    with Server((host, int(port)), Modbus) as server, line:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while True:
            if registers.full:
                time.sleep(0.1)
                continue
            received = line.receive(0.1)
            if received is not None and received.kind == "verdict":
                registers.add(received.header)
            elif received is not None and received.kind == "status":
                state = STATES.get(received.header["state"], 0)
            registers.station = 0 if line.silent else HELD_BACK if line.held_back else state
            if not line.silent and not line.held_back:
                registers.heartbeat = int(time.monotonic() * 10) & 0xFFFF


if __name__ == "__main__":
    main()
