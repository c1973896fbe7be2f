"""What the preview costs the agent, and how old a picture is when it is seen.

    python tests/bench/preview.py [--seconds 10] [--codec vp8] [--browser] [--json]

One folder camera, 1280 x 720 at 10 frames/s, sent at full size, judged by the no-op engine. The agent's own
processor time is read from /proc for 0, 1, 4 and 8 players, which run in a process of their own. Delay is from
`t_grab` to the decoded picture in the player, and with --browser to the moment Chromium expects it on the screen.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import cv2
import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

from flawline.agent.metrics import Metrics
from flawline.agent.observer import JudgedFrame
from flawline.agent.preview import Preview
from flawline.config.settings_preview import PreviewSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "preview"))
from preview_line import Agent

WIDTH, HEIGHT, FPS, BIT, PICTURES = 1280, 720, 10, 48, 32


def draw_pictures(folder: Path) -> None:
    """Textured plates that carry their number in black and white fields along the lower edge."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(PICTURES):
        picture = cv2.GaussianBlur(rng.integers(40, 200, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 4)
        for bit in range(5):
            picture[HEIGHT - BIT :, bit * BIT : (bit + 1) * BIT] = 255 if number >> bit & 1 else 0
        cv2.imwrite(str(folder / f"{number:02}.png"), picture)


def number_in(picture: np.ndarray) -> int:
    """The number a decoded picture shows."""
    return sum(int(picture[HEIGHT - BIT // 2, bit * BIT + BIT // 2].mean() > 128) << bit for bit in range(5))


async def play(url: str, until: float, delays: list[float] | None) -> int:
    """One player; returns how many pictures it decoded. The first one also measures their age, ms."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    peer.addTransceiver("video", direction="recvonly")
    grabbed: dict[int, int] = {}
    channel = peer.createDataChannel("overlay", ordered=False, maxRetransmits=0)

    def note(text: str) -> None:
        drawing = json.loads(text)
        grabbed[drawing["frame_id"] % PICTURES] = drawing["t_grab"]

    channel.on("message", note)
    await peer.setLocalDescription(await peer.createOffer())
    frames, last = 0, -1
    async with aiohttp.ClientSession(url) as http:
        headers = {"Content-Type": "application/sdp"}
        answer = await http.post("/top/whep", data=peer.localDescription.sdp, headers=headers)
        await peer.setRemoteDescription(RTCSessionDescription(await answer.text(), "answer"))
        track = peer.getReceivers()[0].track
        while time.time() < until:
            frame = await asyncio.wait_for(track.recv(), 60)
            frames += 1
            if delays is not None:
                now, number = time.time_ns(), number_in(frame.to_ndarray(format="rgb24"))
                if number != last and number in grabbed:
                    delays.append((now - grabbed[number]) / 1e6)
                last = number
        await http.delete(answer.headers["Location"])
    await peer.close()
    return frames


async def players(url: str, count: int, seconds: float) -> dict[str, Any]:
    """So many players for so long."""
    delays: list[float] = []
    until = time.time() + seconds
    frames = await asyncio.gather(*(play(url, until, delays if number == 0 else None) for number in range(count)))
    return {"frames": frames, "delays": delays}


def processor_s(pid: int) -> float:
    """Processor time of one process without its children, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(agent: Agent, viewers: int, seconds: float) -> dict[str, Any]:
    """The agent's processor time with so many viewers, after they have settled."""
    assert agent.process is not None
    settle = 4.0
    command = [sys.executable, __file__, "--play", agent.url, str(viewers), str(seconds + 2 * settle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if viewers:
            while agent.metric("flawline_preview_viewers") < viewers:
                time.sleep(0.2)
        time.sleep(settle)
        began, used = time.monotonic(), processor_s(agent.process.pid)
        encoded, verdicts = (agent.metric(f"flawline_{n}_total") for n in ("preview_frames_encoded", "verdicts"))
        time.sleep(seconds)
        took = time.monotonic() - began
        used = processor_s(agent.process.pid) - used
        result = {
            "viewers": viewers,
            "agent_cpu_percent": round(100 * used / took, 1),
            "agent_cpu_ms_per_verdict": 0.0,
            "encoded_per_s": round((agent.metric("flawline_preview_frames_encoded_total") - encoded) / took, 1),
            "verdicts_per_s": round((agent.metric("flawline_verdicts_total") - verdicts) / took, 1),
        }
        result["agent_cpu_ms_per_verdict"] = round(10 * result["agent_cpu_percent"] / result["verdicts_per_s"], 1)
        output, _ = process.communicate()
    told = json.loads(output)
    if told["delays"]:
        result["delay_ms_median"] = round(statistics.median(told["delays"]), 1)
        result["delay_ms_p95"] = round(sorted(told["delays"])[int(len(told["delays"]) * 0.95)], 1)
    while agent.metric("flawline_preview_viewers"):
        time.sleep(0.2)
    return result


def measure_browser(agent: Agent, count: int) -> dict[str, Any]:
    """From `t_grab` to the moment at which Chromium expects the picture on the screen."""
    from playwright.sync_api import sync_playwright

    script = """async (count) => {
      const video = document.querySelector('video'), canvas = document.querySelector('.overlay'), ages = [];
      await new Promise((done) => {
        let last = '';
        const look = (now, about) => {
          const { grabbed, matched } = canvas.dataset;
          if (matched === 'true' && grabbed && grabbed !== last)
            ages.push(performance.timeOrigin + about.expectedDisplayTime - grabbed);
          last = grabbed;
          ages.length < count ? video.requestVideoFrameCallback(look) : done();
        };
        video.requestVideoFrameCallback(look);
      });
      return ages;
    }"""
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        page = browser.new_page(viewport={"width": 1024, "height": 768})
        page.goto(agent.url)
        page.wait_for_selector(".overlay[data-matched=true]", timeout=60_000)
        ages = page.evaluate(script, count)
        browser.close()
    return {"delay_ms_median": round(statistics.median(ages), 1), "delay_ms_p95": round(sorted(ages)[-count // 20], 1)}


async def measure_calls() -> dict[str, float]:
    """What one verdict costs the event loop, ms: a good part and a failed one, with nobody and somebody watching."""
    settings = PreviewSettings(fps=30.0)
    picture = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    none = ("reason", "part_id", "deadline_ms", "frame_id", "t_trigger", "t_grab")
    header: dict[str, Any] = dict.fromkeys(none) | {"seq": 1, "camera": "top", "result": "pass", "score": 0.1}
    header |= {"threshold": 0.5, "degraded": False, "recipe": {"id": "default"}, "stage_ms": {}, "defects": []}
    header |= {"t_publish": 0}
    fail = header | {"result": "fail", "defects": [{"bbox": [1, 1, 9, 9], "score": 0.9}]}
    preview = Preview(settings, "line1", ["top"], dict, Metrics(dict, {}, {}))
    measured = {}
    for watched in (False, True):
        if watched:
            waiting = asyncio.ensure_future(preview._plain["top"].next_jpeg())
            await asyncio.sleep(0)
        for name, told in (("good", header), ("failed", fail)):
            spent = []
            for _ in range(100):
                frame = JudgedFrame("verdict", told, picture, mask, mask, [], lambda: lambda: None)
                began = time.perf_counter()
                preview.judged(frame)
                spent.append((time.perf_counter() - began) * 1000)
                await asyncio.sleep(0.034)
            key = f"{name}_{'watched' if watched else 'unwatched'}"
            measured[key] = round(statistics.mean(spent), 3)
    waiting.cancel()
    await preview.close()
    return measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--codec", default="vp8", choices=["vp8", "h264"])
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--play", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.play:
        url, count, seconds = given.play
        print(json.dumps(asyncio.run(players(url, int(count), float(seconds)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder) / "pictures")
        size = f"preview.long_side={WIDTH}"
        agent = Agent(Path(folder), size, f"preview.codec={given.codec}", f"preview.fps={FPS}").start()
        try:
            agent.wait_ready()
            rows = [measure(agent, viewers, given.seconds) for viewers in (0, 1, 4, 8)]
            report: dict[str, Any] = {"codec": given.codec, "load": os.getloadavg()[0], "viewers": rows}
            report["event_loop_ms"] = asyncio.run(measure_calls())
            if given.browser:
                report["browser"] = measure_browser(agent, 60)
        finally:
            agent.stop()
    if given.json:
        print(json.dumps(report))
        return
    print(f"1280 x 720, {FPS} frames/s, {given.codec}; load of the machine {report['load']:.1f}")
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    print("event loop, ms per verdict:", report["event_loop_ms"])
    if given.browser:
        print("Chromium:", report["browser"])


if __name__ == "__main__":
    main()
