"""A viewer that takes nothing any more costs the line nothing: its packets are bounded, and it goes on or goes."""

import asyncio
import contextlib
import itertools
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from preview_line import Agent, events
from prometheus_client import Counter

from flawline.agent import shot
from flawline.agent.encode import Stream, VideoEncoder
from flawline.agent.whep import PacketTrack
from flawline.config.settings_preview import PreviewSettings

PLAYER = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[2])
from test_whep import number_in, player
async def main():
    class Agent: url = sys.argv[1]
    async with player(Agent) as watching:
        while True:
            _, picture = await watching.frame()
            print(time.time(), number_in(picture), flush=True)
asyncio.run(main())
"""


def packets(count: int, key_every: int) -> Iterator[av.Packet]:
    encoder = VideoEncoder("vp8", 64, 48, 10, 500)
    for number in range(count):
        picture = np.full((48, 64, 3), 5 * number % 255, np.uint8)
        yield from encoder.encode(picture, number * 9000, key=number % key_every == 0)


async def test_a_track_that_nobody_reads_drops_and_asks_for_a_key_frame() -> None:
    track = PacketTrack()
    waiting, began = 0, time.monotonic()
    taken = []
    for packet in packets(46, key_every=40):
        taken.append(track.put(packet))
        waiting = max(waiting, track._packets.qsize())
    assert time.monotonic() - began < 20, "nothing was waited for"
    assert waiting <= 12
    lost = taken.index(False)
    assert lost == 12
    assert not any(taken[lost:40]), "without a key frame nothing that follows can be decoded"
    assert all(taken[40:])
    left = [await asyncio.wait_for(track.recv(), 10) for _ in range(6)]
    assert [packet.is_keyframe for packet in left] == [True, *[False] * 5], "it goes on at the key frame"


async def test_a_stream_makes_the_key_frame_that_a_slow_viewer_needs() -> None:
    track, handed = PacketTrack(), []

    class Slow:
        def offer(self, packet: av.Packet, drawing: str) -> bool:
            handed.append((packet.is_keyframe, track.put(packet)))
            return handed[-1][1]

    settings = PreviewSettings(fps=30.0)
    header = {"seq": 1, "frame_id": 1, "result": "pass", "reason": None, "score": 0.1, "threshold": 0.5}
    header |= {"degraded": False, "t_grab": 1, "t_publish": 1, "defects": []}
    blank = np.zeros((48, 64, 3), np.uint8)
    with ThreadPoolExecutor(1) as thread:
        stream = Stream("top", settings, thread, Counter("encoded_in_test", "-", ["camera"]), burn=False)
        stream.join(Slow())
        running = asyncio.create_task(stream.run())
        async with asyncio.timeout(60):
            while sum(not in_step for _, in_step in handed) < 2:
                stream.show(shot.take(header, blank, blank[:, :, 0], blank[:, :, 0], [], 64))
                await asyncio.sleep(0.02)
            seen = len(handed)
            while len(handed) < seen + 2:
                stream.show(shot.take(header, blank, blank[:, :, 0], blank[:, :, 0], [], 64))
                await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.wait([running])
    after_loss = [following for (_, in_step), following in itertools.pairwise(handed) if not in_step]
    assert after_loss
    assert all(key and in_step for key, in_step in after_loss), handed


@contextmanager
def stopped_player(agent: Agent) -> Iterator[subprocess.Popen[str]]:
    """A WHEP player that played and then was stopped, so that it takes nothing and says nothing."""
    command = [sys.executable, "-c", PLAYER, agent.url, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as player:
        assert player.stdout is not None
        try:
            for _ in range(5):
                assert player.stdout.readline()
            player.send_signal(signal.SIGSTOP)
            yield player
        finally:
            player.kill()


def line(agent: Agent) -> tuple[float, float, int]:
    """Verdicts a second, median time from trigger to publishing (ms), and the agent's memory (bytes)."""
    _, *later = events(agent, 6.0)
    verdicts = [verdict for event in later for verdict in event["verdicts"]]
    seqs = [verdict["seq"] for verdict in verdicts]
    assert seqs == list(range(seqs[0], seqs[-1] + 1))
    rate = (len(verdicts) - 1) / (verdicts[-1]["t_publish"] - verdicts[0]["t_publish"]) * 1e9
    times = [(verdict["t_publish"] - verdict["t_trigger"]) / 1e6 for verdict in verdicts]
    assert agent.process is not None
    pages = int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1])
    return rate, statistics.median(times), pages * 4096


def test_stopped_viewers_do_not_slow_the_line_and_are_let_go(start: Callable[..., Agent]) -> None:
    agent = start().wait_ready()
    rate, delay, memory = line(agent)
    with socket.socket() as reader, stopped_player(agent):
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", agent.port))
        reader.sendall(f"GET /top/mjpeg HTTP/1.1\r\nHost: 127.0.0.1:{agent.port}\r\n\r\n".encode())
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        assert agent.metric("flawline_preview_viewers") == 2
        held_rate, held_delay, held_memory = line(agent)
        assert held_rate > 0.7 * rate
        assert held_delay < 3 * delay + 100
        assert held_memory < memory + 64 * 2**20, "encoder and video libraries, but no pile of packets"
        deadline = time.monotonic() + 120
        while agent.metric("flawline_preview_viewers") and time.monotonic() < deadline:
            time.sleep(0.5)
        assert agent.metric("flawline_preview_viewers") == 0


def test_mjpeg_over_a_slow_link_is_not_an_old_picture(agent: Agent) -> None:
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", agent.port))
        reader.sendall(f"GET /top/mjpeg HTTP/1.1\r\nHost: 127.0.0.1:{agent.port}\r\n\r\n".encode())
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        time.sleep(4)  # it takes nothing for a while: what comes at once now was made and kept meanwhile
        kept, until = b"", time.monotonic() + 0.3
        reader.settimeout(0.05)
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                kept += reader.recv(2**20)
    assert 0 < len(kept) < 200_000


def test_a_viewer_that_was_stopped_for_a_moment_goes_on(agent: Agent) -> None:
    with stopped_player(agent) as player:
        assert player.stdout is not None
        time.sleep(4)
        resumed = time.time()
        player.send_signal(signal.SIGCONT)
        numbers: set[int] = set()
        while len(numbers) < 8:
            told = player.stdout.readline().split()
            assert told, "the player has given up"
            if float(told[0]) > resumed + 2:
                numbers.add(int(told[1]))
