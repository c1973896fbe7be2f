"""A line's own network: two machines on one cable, no other host, no default route, no name server."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from preview_line import Agent

AGENT, PLAYER = "10.77.0.1", "10.77.0.2"

PLAY = """
import asyncio, sys, time, urllib.request
sys.path.insert(0, sys.argv[2])
from test_whep import number_in, player
class Agent: url = sys.argv[1]
def wait_ready():
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        try:
            return urllib.request.urlopen(Agent.url + "/readyz", timeout=10)
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the agent is not ready")
async def main():
    wait_ready()
    async with player(Agent) as watching:
        print(sorted({number_in((await watching.frame())[1]) for _ in range(12)}))
        print([line for line in watching.answer.splitlines() if line.startswith("a=candidate")])
asyncio.run(main())
"""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def inside(machine: subprocess.Popen[bytes]) -> list[str]:
    """What stands before a command so that it runs on that machine."""
    return ["nsenter", "--net", "--target", str(machine.pid)]


@pytest.fixture
def machines() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two network namespaces, joined by a cable."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    if subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "probe", "type", "veth"], capture_output=True
    ).returncode:
        pytest.skip("network namespaces with a virtual cable need root and the kernel's veth")
    with contextlib.ExitStack() as stack:
        both = []
        for _ in range(2):
            # It says when it is in its namespace; only then may others be put there.
            command = ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"]
            machine = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(machine.kill)
            assert machine.stdout is not None
            assert machine.stdout.readline() == b"\n"
            both.append(machine)
        here = inside(both[0])
        run(*here, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(both[1].pid))
        for machine, address in zip(both, (AGENT, PLAYER), strict=True):
            run(*inside(machine), "ip", "address", "add", f"{address}/30", "dev", "cable")
            for link in ("lo", "cable"):
                run(*inside(machine), "ip", "link", "set", link, "up")
        yield both


def test_plays_on_a_network_without_a_default_route(machines: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    for machine in machines:
        assert run(*inside(machine), "ip", "route", "show", "default") == ""
        assert "cable" in run(*inside(machine), "ip", "route")
    agent = Agent(tmp_path, f"preview.host={AGENT}", "preview.insecure=true")
    agent.command = [*inside(machines[0]), *agent.command]
    agent.start()
    try:
        url = f"http://{AGENT}:{agent.port}"
        player = [*inside(machines[1]), sys.executable, "-c", PLAY, url, str(Path(__file__).parent)]
        done = subprocess.run(player, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr + agent.log()
        numbers, candidates = done.stdout.splitlines()
        assert len(numbers.split(",")) > 3, "pictures came, and they change"
        assert f" {AGENT} " in candidates
        assert "127.0.0.1" not in candidates
    finally:
        agent.stop()
