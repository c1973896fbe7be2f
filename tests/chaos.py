"""Chaos: a station under fire, and two ledgers that must agree: what was triggered, and what a subscriber got.

    python tests/chaos.py --triggers 20000 --fuzz 100000 --seed 1        (`make chaos`)

While triggers are sent one after the other, at random: the worker is killed and stopped, the agent is killed and
started again, cameras are lost, subscribers are slow or vanish, the journal's disk is full, and the control socket
gets malformed messages. The judging is scripted by the pictures (tests/system/scripted_engine.py), so that the harness
knows which ones may pass. Nothing here comes from the agent's own counters.
"""

import argparse
import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import zmq
from chaos_ledgers import DEADLINE_MS, Ledgers, Report, Sent, reckon

sys.path.insert(0, str(Path(__file__).parent / "system"))
from station import Station

_OUTSTANDING = 10  # triggers without a verdict; then the sender waits
_LIMITS = f"""
[recipes.default]
[recipes.quick]
deadline_ms = {DEADLINE_MS}
[worker]
job_limit_s = 2.0
ping_limit_s = 2.0
restarts_per_minute = 40
max_frame_mpx = 1
"""


class Chaos:
    """One run."""

    def __init__(
        self,
        folder: Path,
        triggers: int,
        fuzz: int,
        seed: int,
        *,
        tmpfs: bool = False,
        pause_s: float = 5.0,
        least_faults: int = 20,
    ) -> None:
        self.pause_s = pause_s
        self.least_faults = least_faults  # on a fast machine more triggers are sent until there were so many
        self.random = random.Random(seed)
        self.triggers = triggers
        self.fuzz = fuzz
        self.ledgers = Ledgers()
        self.faults: Counter[str] = Counter()
        self.fuzz_sent = 0
        self.fuzz_replies: Counter[str] = Counter()
        self.accepted = 0
        self.refusing = False
        self.over = threading.Event()
        self.sending_done = threading.Event()
        self.tmpfs = folder / "state" if tmpfs else None
        self.orders = {
            "quick": self._orders(["good"] * 30 + ["bad"] * 20 + ["slow"] * 20 + ["degraded"] * 10),
            "plain": self._orders(
                ["good"] * 110 + ["bad"] * 84 + ["oom_once", "oom", "wrong", "unreadable", "crash", "hang"]
            ),
            "third": self._orders(["good"] * 50 + ["bad"] * 30),
        }
        self.station = Station(folder, self.orders, _LIMITS, trigger_timeout_ms=1000)
        text = self.station.config.read_text().replace('name = "quick"', 'name = "quick"\nrecipe = "quick"')
        self.station.config.write_text(text)

    def _orders(self, kinds: list[str]) -> list[tuple[str, int]]:
        self.random.shuffle(kinds)
        return [("good", 80) if kind == "slow" else (kind, 20 if kind == "degraded" else 0) for kind in kinds]

    # -- the sender -------------------------------------------------------------------------------------------

    def send_all(self) -> None:
        """Trigger after trigger, as fast as verdicts come back."""
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.connect(self.station.control)
        names = list(self.orders)
        number = accepted = 0
        while accepted < self.triggers or sum(self.faults.values()) < self.least_faults:
            number += 1
            name, trigger_id = names[number % len(names)], f"T{number:06}"
            patience = time.monotonic() + 2.0
            while self._unanswered() >= _OUTSTANDING and time.monotonic() < patience:
                self._replies(socket, 5)
            sent = self.ledgers.sent[trigger_id] = Sent(name, time.monotonic())
            request = {"cmd": "trigger", "id": trigger_id, "camera": name, "trigger_id": trigger_id}
            with contextlib.suppress(zmq.Again):
                socket.send_multipart([b"", msgpack.packb(request)], zmq.NOBLOCK)
            sent.at = time.monotonic()
            self._replies(socket, 0)
            accepted = self.accepted
            if self.refusing:  # a restart: it takes no triggers yet
                time.sleep(0.1)
                self.refusing = False
        self.sending_done.set()
        while not self.over.is_set():
            self._replies(socket, 100)
        context.destroy(linger=0)

    def _unanswered(self) -> int:
        """What is under way; what is older than three seconds went down with an agent."""
        recent = [
            (name, self.ledgers.sent[name]) for name in itertools.islice(reversed(self.ledgers.sent), 4 * _OUTSTANDING)
        ]
        young = time.monotonic() - 3.0
        return sum(
            name not in self.ledgers.answered and sent.reply != "refused" and sent.at > young for name, sent in recent
        )

    def _replies(self, socket: zmq.Socket[bytes], wait_ms: int) -> None:
        while socket.poll(wait_ms):
            reply = msgpack.unpackb(socket.recv_multipart()[1])
            wait_ms = 0
            if reply["ok"]:
                self.accepted += 1
                self.ledgers.sent[reply["id"]].reply = "accepted" if reply["journalled"] else "unjournalled"
            else:
                self.ledgers.sent[reply["id"]].reply = "refused"
                self.refusing = True

    # -- the subscriber ---------------------------------------------------------------------------------------

    def receive_all(self) -> None:
        """Write down what comes, without any healing."""
        context = zmq.Context()
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.RCVHWM, 0)
        for topic in (b"verdict/", b"late/"):
            socket.setsockopt(zmq.SUBSCRIBE, topic)
        socket.connect(self.station.publish)
        while not self.over.is_set():
            if not socket.poll(50):
                continue
            topic, data = socket.recv_multipart()
            header = msgpack.unpackb(data) | {"t_received": time.monotonic()}
            if topic.startswith(b"late/"):
                self.ledgers.late.append(header)
            else:
                self.ledgers.got.append(header)
                self.ledgers.answered.add(header["trigger_id"])
        context.destroy(linger=0)

    def fetch_missing(self) -> None:
        """What the subscriber missed, by replay, as any subscriber may."""
        first, done = 1, False
        seen = {header["seq"] for header in self.ledgers.got}
        while not done:
            page = self.station.ask("replay", from_seq=first, limit=500)
            self.ledgers.fetched += [header for header in page["verdicts"] if header["seq"] not in seen]
            first, done = page["next_seq"], page["done"]
        self.ledgers.answered |= {header["trigger_id"] for header in self.ledgers.fetched}

    # -- malformed messages -----------------------------------------------------------------------------------

    def fuzz_all(self) -> None:
        """Random bytes, torn and twisted requests, wrong frames."""
        rng = random.Random(7)
        context = zmq.Context()
        socket = self._fuzzer(context)
        waiting, heard = 0, time.monotonic()
        while self.fuzz_sent < self.fuzz and not self.over.is_set():
            with contextlib.suppress(zmq.Again):
                socket.send_multipart(_nonsense(rng), zmq.NOBLOCK)
                self.fuzz_sent += 1
                waiting += 1
            while socket.poll(0 if waiting < 200 else 5):
                reply = msgpack.unpackb(socket.recv_multipart()[-1])
                self.fuzz_replies["ok" if reply["ok"] else "refused"] += 1
                waiting, heard = max(0, waiting - 1), time.monotonic()
            if waiting >= 200 and time.monotonic() - heard > 1.0:  # the agent was killed, or dropped us
                socket.close(0)
                socket, waiting, heard = self._fuzzer(context), 0, time.monotonic()
        context.destroy(linger=0)

    def _fuzzer(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.connect(self.station.control)
        return socket

    # -- faults -----------------------------------------------------------------------------------------------

    def rage(self) -> None:
        """One fault after another until every trigger is sent."""
        faults = {
            self._kill_worker: 5,
            self._stop_worker: 1,
            self._kill_agent: 3,
            self._restart_agent: 1,
            self._lose_camera: 3,
            self._slow_subscriber: 2,
            self._vanish: 3,
            self._fill_disk: 3,
        }
        while not self.sending_done.is_set():
            self.sending_done.wait(self.random.uniform(0.0, 2 * self.pause_s))
            if self.sending_done.is_set():
                return
            (fault,) = self.random.choices(list(faults), list(faults.values()))
            fault()
            self.faults[fault.__name__.strip("_")] += 1

    def start_agent(self) -> None:
        """And wait until it takes triggers."""
        self.station.start("--set", "journal.min_free_mb=4", "--set", "journal.archive_mb=4")

    def _signal_worker(self, number: int) -> None:
        worker = self.station.status().get("worker") or {}
        if worker.get("ready"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], number)

    def _kill_worker(self) -> None:
        self._signal_worker(signal.SIGKILL)

    def _stop_worker(self) -> None:
        self._signal_worker(signal.SIGSTOP)

    def _kill_agent(self) -> None:
        self.station.kill()
        self.start_agent()

    def _restart_agent(self) -> None:
        process = self.station.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        self.start_agent()

    def _lose_camera(self) -> None:
        there = self.station.folder / self.random.choice(list(self.orders))
        away = there.with_name(there.name + ".away")
        there.rename(away)
        time.sleep(self.random.uniform(0.1, 0.8))
        away.rename(there)

    def _slow_subscriber(self) -> None:
        threading.Thread(target=self._read_nothing, args=(self.random.uniform(1, 4),), daemon=True).start()

    def _read_nothing(self, seconds: float) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(self.station.publish)
        time.sleep(seconds)
        context.destroy(linger=0)

    def _vanish(self) -> None:
        code = (
            "import os, signal, sys, zmq; s = zmq.Context().socket(zmq.SUB); s.subscribe(b''); s.connect(sys.argv[1])\n"
            "s.poll(2000); os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.Popen([sys.executable, "-c", code, self.station.publish])

    def _fill_disk(self) -> None:
        with self._full_disk():
            time.sleep(self.random.uniform(0.2, 1.0))
            if self.random.random() < 0.3:
                self.station.kill()
                self.faults["kill_agent_on_full_disk"] += 1
        if self.station.process is None:
            self.start_agent()

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        if self.tmpfs is not None:
            filler = self.tmpfs / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
                while True:
                    out.write(bytes(65536) if shutil.disk_usage(self.tmpfs).free > 65536 else bytes(512))
            yield
            filler.unlink()
            return
        assert self.station.process is not None
        pid = self.station.process.pid
        journal = self.station.folder / "state" / "line1" / "journal.sqlite-wal"
        size = journal.stat().st_size if journal.exists() else 100_000
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(size, 4096), hard))
        yield
        if self.station.process is not None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    # -- the run ----------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """All of it, and the reckoning."""
        self.start_agent()
        threads = [threading.Thread(target=work) for work in (self.send_all, self.receive_all, self.fuzz_all)]
        for thread in threads:
            thread.start()
        try:
            self.rage()
            threads[2].join(600)
            self._settle()
        finally:
            self.over.set()
            for thread in threads:
                thread.join(30)
        self.fetch_missing()
        self.station.stop()
        self.station.close()
        fuzz = self.fuzz_sent, self.fuzz
        return reckon(self.ledgers, self.orders, self.station.ledger, self.faults, fuzz, self.fuzz_replies)

    def _settle(self) -> None:
        """Until every trigger that was accepted is answered, for a minute."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.5)
            self.fetch_missing()
            sent = self.ledgers.sent
            if not [name for name in sent if sent[name].reply == "accepted" and name not in self.ledgers.answered]:
                time.sleep(2.0)
                self.ledgers.fetched.clear()
                return


def _nonsense(rng: random.Random) -> list[bytes]:
    requests: list[dict[str, Any]] = [
        {"cmd": "status", "id": 1},
        {"cmd": "replay", "id": 2, "from_seq": -5, "to_seq": 2**63, "limit": 10**9},
        {"cmd": "trigger", "id": [1], "camera": "nowhere", "trigger_id": 7},
        {"cmd": "feedback", "id": None, "seq": 0, "label": "x" * 3000},
        {"cmd": "recipe.activate", "camera": "plain", "recipe": "none of ours"},
        {"cmd": {"a": 1}, "id": 2.5},
    ]
    data = bytearray(msgpack.packb(rng.choice(requests[1:])))
    match rng.randrange(6):
        case 0:
            return [b"", rng.randbytes(rng.randrange(200))]
        case 1:
            return [b"", bytes(data[: rng.randrange(len(data))])]
        case 2:
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return [b"", bytes(data)]
        case 3:
            return [bytes(data)] * rng.randrange(1, 5)
        case 4:
            return [b"", b"\x91" * rng.randrange(1, 2000) + bytes(data)]
        case _:
            return [b"", bytes(data)]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A tmpfs for the journal where this user may mount one; else the agent's files are limited in size."""
    state = folder / "state"
    state.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(state)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(state)], check=False)


def main() -> int:
    """Exit code 0 where nothing was missing, double or wrongly passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triggers", type=int, default=20_000)
    parser.add_argument("--fuzz", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        tmpfs = stack.enter_context(small_disk(folder, 64))
        print(
            f"full disk by {'a tmpfs of 64 MB' if tmpfs else 'a limit on file size'}, seed {options.seed}", flush=True
        )
        report = Chaos(folder, options.triggers, options.fuzz, options.seed, tmpfs=tmpfs).run()
    print(report)
    return 0 if report.flawless else 1


if __name__ == "__main__":
    sys.exit(main())
