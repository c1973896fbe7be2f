"""The subscriber beside a station whose control port is dead: it says so, keeps time, and lets no verdict overtake."""

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import zmq

from flawline.agent import subscriber
from flawline.agent.subscriber import Subscriber
from flawline.agent.wire import pack, unpack
from flawline.config.errors import ConfigError

ASK_S, AGAIN_S, TIMEOUT_S = 0.4, 0.2, 0.05  # an attempt is longer than the pause, as the real ones are
SLACK_S = 1.0  # of a busy machine

pytestmark = pytest.mark.timeout(60)


class Station:
    """Publishes what a test says; its control port answers only once it is opened."""

    def __init__(self, folder: Path) -> None:
        self.publish, self.control = f"ipc://{folder}/publish", f"ipc://{folder}/control"
        self.last_seq = 0
        self.boot_id = "a"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._out = self._context.socket(zmq.PUB)
        self._out.bind(self.publish)

    def say_status(self) -> None:
        cameras = {"top": {"camera_seq": self.last_seq}}
        status = {"boot_id": self.boot_id, "last_seq": self.last_seq, "control": self.control, "cameras": cameras}
        self._out.send_multipart([b"status/line1/", pack(status)])

    def verdict(self, seq: int, *, lost: bool = False) -> None:
        """`lost`: on its way to the subscriber."""
        self.last_seq = seq
        if not lost:
            self._out.send_multipart([b"verdict/line1/top/", pack(self._header(seq))])

    @staticmethod
    def _header(seq: int) -> dict[str, Any]:
        return {"seq": seq, "camera_seq": seq, "station": "line1", "camera": "top"}

    def open_control(self) -> None:
        def answer() -> None:
            server = self._context.socket(zmq.REP)
            server.bind(self.control)
            try:
                while True:
                    request = unpack(server.recv())
                    span = range(request["from_seq"], request["to_seq"] + 1)
                    verdicts = [self._header(seq) for seq in span]
                    server.send(pack({"id": request["id"], "ok": True, "verdicts": verdicts, "done": True}))
            except zmq.ContextTerminated:
                server.close(linger=0)

        Thread(target=answer, daemon=True).start()

    def close(self) -> None:
        self._out.close(linger=0)
        self._context.term()


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Station]:
    monkeypatch.setattr(subscriber, "_ASK_S", ASK_S)
    monkeypatch.setattr(subscriber, "_AGAIN_S", AGAIN_S)
    made = Station(tmp_path)
    yield made
    made.close()


def receive(line: Subscriber) -> list[int]:
    """The number of the verdict that a call gives, if it gives one; it must come back in time."""
    began = time.monotonic()
    received = line.receive(TIMEOUT_S)
    assert time.monotonic() - began < TIMEOUT_S + ASK_S + SLACK_S
    return [received.header["seq"]] if received is not None and received.kind == "verdict" else []


def take(line: Subscriber, count: int) -> list[int]:
    numbers: list[int] = []
    end = time.monotonic() + 20
    while len(numbers) < count:
        assert time.monotonic() < end, numbers
        numbers += receive(line)
    return numbers


def wait_until_held_back(line: Subscriber) -> None:
    end = time.monotonic() + 20
    while not line.held_back:
        assert time.monotonic() < end
        assert receive(line) == []


def connect(station: Station, line: Subscriber) -> None:
    end = time.monotonic() + 20
    while True:
        assert time.monotonic() < end
        station.say_status()
        if line.receive(TIMEOUT_S) is not None:
            return


@pytest.mark.parametrize("topic", ["verdict/", "verdict/line1/top/"])
def test_a_gap_that_cannot_be_fetched_is_told_and_nothing_overtakes_it(station: Station, topic: str) -> None:
    with Subscriber(station.publish, topic, silence_s=1.5) as line:
        connect(station, line)
        station.verdict(1)
        assert take(line, 1) == [1]
        assert not line.held_back
        station.verdict(2, lost=True)
        told_after = None
        began = time.monotonic()
        while time.monotonic() - began < 4 * (ASK_S + AGAIN_S):
            station.verdict(station.last_seq + 1)
            station.say_status()
            assert receive(line) == []  # on time, and no later verdict before the missing one
            assert not line.silent  # the attempts are no silence
            if line.held_back and told_after is None:
                told_after = time.monotonic() - began
        assert told_after is not None
        assert told_after < 2 * ASK_S + SLACK_S
        newest = station.last_seq
        station.open_control()
        assert take(line, newest - 1) == list(range(2, newest + 1))
        assert not line.held_back
        station.verdict(newest + 1)
        assert take(line, 1) == [newest + 1]
        assert line.lost == []


def test_a_station_that_names_no_control_socket_holds_back_and_says_so(station: Station) -> None:
    with Subscriber(station.publish) as line:
        while line.last_seq is None:  # no status at all
            station.verdict(1)
            receive(line)
        station.verdict(3)
        wait_until_held_back(line)


@pytest.mark.parametrize("topic", ["verdict/", "verdict/line1/top/"])
def test_a_subscriber_with_patience_goes_on_behind_a_gap_that_nobody_heals(station: Station, topic: str) -> None:
    with Subscriber(station.publish, topic, patience_s=1.0) as line:
        connect(station, line)
        station.verdict(1)
        assert take(line, 1) == [1]
        station.verdict(2, lost=True)
        station.verdict(3)
        end = time.monotonic() + 20
        while not line.lost:
            assert time.monotonic() < end
            station.say_status()
            assert receive(line) == []
        station.verdict(4)
        assert take(line, 1) == [4]
        assert line.lost == [(2, 3)]
        assert not line.held_back


def test_a_long_catching_up_is_no_failure(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed attempt after it, and what the journal has is still fetched."""
    answers = iter(["page", "nobody", "rest"])

    def ask(_endpoint: str, request: dict[str, Any], *_: Any) -> dict[str, Any]:
        answer = next(answers)
        if answer == "nobody":
            raise ConfigError("no agent answers")
        last = 1 if answer == "page" else request["to_seq"]
        found = [Station._header(seq) for seq in range(request["from_seq"], last + 1)]
        return {"verdicts": found, "done": answer == "rest"}

    monkeypatch.setattr(subscriber, "ask", ask)
    station.last_seq = 5
    with Subscriber(station.publish, from_seq=1, patience_s=0.5) as line:
        connect(station, line)
        assert take(line, 1) == [1]
        time.sleep(1.0)  # whoever reads is slow
        assert take(line, 4) == [2, 3, 4, 5]
        assert line.lost == []


def test_what_is_no_verdict_is_passed_over(station: Station) -> None:
    with Subscriber(station.publish) as line:
        connect(station, line)
        station._out.send_multipart([b"verdict/line1/top/", pack({"seq": 1, "result": "pass"})])
        station.verdict(1)
        assert take(line, 1) == [1]


def test_a_station_that_dies_while_verdicts_are_missing_is_silent(station: Station) -> None:
    with Subscriber(station.publish, silence_s=1.0) as line:
        connect(station, line)
        station.verdict(2)  # the first was lost
        end = time.monotonic() + 1.0 + 2 * ASK_S + SLACK_S
        while not (line.held_back and line.silent):
            assert time.monotonic() < end
            assert receive(line) == []


def test_a_station_that_counts_anew_holds_nothing_back(station: Station) -> None:
    station.last_seq = 5
    with Subscriber(station.publish) as line:
        connect(station, line)
        station.verdict(7)
        wait_until_held_back(line)
        station.last_seq, station.boot_id = 0, "b"
        station.say_status()
        end = time.monotonic() + 20
        while line.held_back:
            assert time.monotonic() < end
            assert receive(line) == []
        station.verdict(1)
        assert take(line, 1) == [1]
