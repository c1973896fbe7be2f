"""From the command to READY: seconds on the clock and of the processor, beside a bare `import torch` in the same run.

    python tests/bench/start.py [--runs 3] [--bundle demo] [--against OTHER/src]

`--against` takes turns with another version's source folder. Text features are on the disk after the first run, which
is not counted. Processor time is that of the agent and of its worker until READY; on a busy machine it says more than
the clock.
"""

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = [sys.executable, "-c", "from flawline.agent.cli import main; main()", "run"]
TICKS = os.sysconf("SC_CLK_TCK")


def processor_s(agent: int) -> tuple[float, float]:
    """User and system time so far of the agent and of its children that live."""
    own = children = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        used = (int(fields[11]) + int(fields[12])) / TICKS
        if int(folder.name) == agent:
            own = used
        elif int(fields[1]) == agent:
            children += used
    return own, children


def start(source: str, bundle: str) -> str:
    """Start an agent, wait for READY as systemd does, stop it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"{folder}/notify")
        notify.settimeout(300)
        options = [f"--set={key}" for key in (f"model.bundle={bundle}", f"journal.path={folder}/state")]
        options += [f"--set={name}.endpoint=ipc://{folder}/{name}" for name in ("publish", "control")]
        environment = os.environ | {"NOTIFY_SOCKET": f"{folder}/notify", "PYTHONPATH": source}
        began = time.monotonic()
        with (Path(folder) / "log").open("wb") as log:
            command = [*RUN, *options, "--set=preview.enabled=false"]
            agent = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
        try:
            while b"READY=1" not in notify.recv(4096):
                pass
        except TimeoutError:
            print((Path(folder) / "log").read_text())
            raise
        finally:
            took, (own, children) = time.monotonic() - began, processor_s(agent.pid)
            agent.terminate()
            agent.wait()
    return f"{took:6.2f} s, of the processor {own + children:5.2f} s: agent {own:4.2f}, worker {children:4.2f}"


def import_torch() -> str:
    """The same of a bare `import torch`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{took:6.2f} s, of the processor {used:5.2f} s"


def main() -> None:
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--against", help="source folder of another version")
    given = parser.parse_args()
    own = str(Path(__file__).parents[2] / "src")
    sources = {"flawline": own} | ({"against": given.against} if given.against else {})
    for source in sources.values():
        start(source, given.bundle)
    for _ in range(given.runs):
        for name, source in sources.items():
            print(f"{name:12}{start(source, given.bundle)}", flush=True)
        print(f"{'import torch':12}{import_torch()}", flush=True)
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
