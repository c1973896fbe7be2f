"""Delivery: a subscriber misses nothing, whoever dies and whatever is lost on the way; CURVE lets in who may."""

import contextlib
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from station import CLI, Make, free_port

from flawline.agent.control import ask
from flawline.agent.subscriber import Subscriber
from flawline.config.errors import NoAnswer


class LossyWay:
    """A TCP relay between subscriber and agent that can be cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.refuses = False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                here.close()
                continue
            try:
                there = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the agent has stopped
                here.close()
                continue
            self._open += [here, there]
            for a, b in ((here, there), (there, here)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        self.refuses = True
        for end in self._open:
            with contextlib.suppress(OSError):  # the other side may be gone already
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def mend(self) -> None:
        self.refuses = False

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def ways() -> Iterator[list[LossyWay]]:
    made: list[LossyWay] = []
    yield made
    for way in made:
        way.cut()
        way.close()


def take(subscriber: Subscriber, until: str, limit_s: float = 30.0) -> list[tuple[str, bool]]:
    """(trigger_id, replayed) of the verdicts up to one."""
    taken: list[tuple[str, bool]] = []
    end = time.monotonic() + limit_s
    while not taken or taken[-1][0] != until:
        assert time.monotonic() < end, taken
        received = subscriber.receive(0.2)
        if received is not None and received.kind == "verdict":
            taken.append((received.header["trigger_id"], received.replayed))
    return taken


@pytest.mark.parametrize("topic", ["verdict/", "verdict/line1/top/"])
def test_what_was_lost_on_the_way_is_fetched_in_order(make_station: Make, ways: list[LossyWay], topic: str) -> None:
    station = make_station({"top": [("good", 0)], "side": [("bad", 0)]}).start()
    ways.append(LossyWay(int(station.publish.rsplit(":", 1)[1])))
    with Subscriber(ways[0].endpoint, topic, silence_s=2.0) as subscriber:
        while (first := subscriber.receive(5)) is None or first.kind != "status":
            pass
        station.trigger("top", "A")
        assert take(subscriber, "A") == [("A", False)]
        ways[0].cut()
        station.trigger("top", "B")
        station.trigger("side", "other")
        station.trigger("top", "C")
        station.until("verdict", 4)
        while not subscriber.silent:
            assert subscriber.receive(0.2) is None
        ways[0].mend()
        got = take(subscriber, "C")  # the status says that there is more, before any further verdict comes
        assert [name for name, _ in got] == (["B", "C"] if "top" in topic else ["B", "other", "C"])
        assert all(replayed for _, replayed in got)
        assert not subscriber.silent
        station.trigger("side", "last of side")
        station.trigger("top", "D")
        assert take(subscriber, "D")[-1] == ("D", False)
        assert subscriber.lost == []
    station.stop()


def test_a_restarted_subscriber_goes_on_where_it_was(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]}).start()
    station.trigger("top", *"ABC")
    station.until("verdict", 3)
    station.kill()
    station.start()
    station.trigger("top", "D")
    station.until("verdict", 4)
    with Subscriber(station.publish, from_seq=2) as subscriber:
        assert [name for name, _ in take(subscriber, "D")] == ["B", "C", "D"]
        assert subscriber.last_seq == 4
    command = [*CLI, "subscribe", "--endpoint", station.publish, "--from-seq", "1", "--count", "4"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert [line.split()[1] for line in shown.stdout.splitlines()] == ["seq=1", "seq=2", "seq=3", "seq=4"]
    station.stop()


def test_numbers_that_were_jumped_over_are_named_lost(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]}).start()
    with Subscriber(station.publish, from_seq=1) as subscriber:
        station.trigger("top", "A")
        take(subscriber, "A")
        station.kill()
        (station.folder / "state" / "line1" / "journal.sqlite").write_bytes(b"no database" * 999)
        (station.folder / "state" / "line1" / "journal.sqlite-wal").unlink()
        station.start()
        jump = station.status()["seq_jump"]
        station.trigger("top", "B")
        take(subscriber, "B")
        assert subscriber.last_seq == jump[1]
        assert subscriber.lost == [(2, jump[1] - 1)]
    assert list((station.folder / "state" / "line1").glob("journal.corrupt-*"))
    station.stop()


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    done = subprocess.run([*CLI, "keys", str(folder), name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    secret, public = (Path(line) for line in done.stdout.splitlines())
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    return secret, public


def test_curve_lets_in_whose_key_lies_in_the_folder(make_station: Make, tmp_path: Path) -> None:
    server_secret, server_public = keys(tmp_path / "keys", "server")
    friend, friend_public = keys(tmp_path / "keys", "friend")
    stranger, _ = keys(tmp_path / "keys", "stranger")
    again = subprocess.run([*CLI, "keys", str(tmp_path / "keys"), "server"], capture_output=True, text=True, timeout=60)
    assert (again.returncode, "not overwritten" in again.stderr) == (2, True)
    clients = tmp_path / "clients"
    clients.mkdir()
    station = make_station({"top": [("good", 0)]})
    text = station.config.read_text().replace(
        "[publish]\n", f'[publish]\ncurve_secret = "{server_secret}"\ncurve_clients = "{clients}"\n'
    )
    station.config.write_text(text)
    station.process = subprocess.Popen(
        [*CLI, "run", "--config", str(station.config), *NOOP], stderr=station.log.open("w")
    )
    request = {"cmd": "status", "id": 1}
    station.wait_for(lambda: "worker_ready" in station.log.read_text())
    for keyed in (None, (server_public, stranger), (server_public, friend)):
        with pytest.raises(NoAnswer, match="no agent answers"):
            ask(station.control, request, 1.0, keyed)
    friend_public.rename(clients / "friend.public")  # takes effect at the next handshake
    assert ask(station.control, request, 20.0, (server_public, friend))["ok"]
    with pytest.raises(NoAnswer, match="no agent answers"):
        ask(station.control, request, 1.0, (server_public, stranger))
    with Subscriber(station.publish, from_seq=1, keys=(server_public, friend)) as subscriber:
        ask(station.control, {"cmd": "trigger", "camera": "top", "trigger_id": "A"}, 20.0, (server_public, friend))
        take(subscriber, "A")
    assert station.receive() is False  # the station's own subscriber has no key
    station.stop()


NOOP = ("--set", "worker.engine=flawline.models.noop:NoopEngine")


@pytest.mark.parametrize("section", ["publish", "control"])
def test_other_addresses_demand_curve(make_station: Make, section: str, tmp_path: Path) -> None:
    station = make_station({"top": [("good", 0)]})
    address = f"{section}.endpoint=tcp://0.0.0.0:{free_port()}"
    command = [*CLI, "run", "--config", str(station.config), *NOOP, "--set", address]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"{section}.endpoint" in refused.stderr
    assert "curve_secret" in refused.stderr
    secret, _ = keys(tmp_path / "keys", "server")
    half = subprocess.run([*command, "--set", f"{section}.curve_secret={secret}"], capture_output=True, timeout=60)
    assert (half.returncode, b"curve_clients" in half.stderr) == (2, True)
    secret.chmod(0o644)
    both = ["--set", f"{section}.curve_secret={secret}", "--set", f"{section}.curve_clients={tmp_path}"]
    open_secret = subprocess.run([*command, *both], capture_output=True, timeout=60)
    assert (open_secret.returncode, b"chmod 600" in open_secret.stderr) == (2, True)
