"""Real pictures through folder cameras: a subscriber in a process of its own gets exactly one verdict for each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]
SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("FLAWLINE_SHARED_DATA", SHARED)).resolve()  # the agent runs in a folder of its own
FOLDERS = {"transistor": DATA / "mvtec_transistor" / "test", "plate": DATA / "mpdd_metal_plate" / "test"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_picture_gets_exactly_one_verdict(tmp_path: Path) -> None:
    for folder in FOLDERS.values():
        if not folder.is_dir():
            pytest.skip(f"no real pictures in {folder}")
    # Every file there is a picture; counted without the camera's own idea of what one is.
    counts = {name: sum(file.is_file() for file in folder.rglob("*")) for name, folder in FOLDERS.items()}
    assert min(counts.values()) > 50
    cameras = "".join(
        f'[[cameras]]\nname = "{name}"\nbackend = "folder"\npath = "{folder}"\nloop = false\nfps = 100.0\n'
        for name, folder in FOLDERS.items()
    )
    endpoint, control = f"ipc://{tmp_path}/verdicts", f"ipc://{tmp_path}/control"
    (tmp_path / "line.toml").write_text(
        f'{cameras}[publish]\nendpoint = "{endpoint}"\n[control]\nendpoint = "{control}"\n'
        f'[journal]\npath = "state"\narchive = "never"\n[preview]\nenabled = false\n[log]\nformat = "json"\n'
        f'[worker]\nengine = "flawline.models.noop:NoopEngine"\n'
    )
    total = sum(counts.values())
    got = tmp_path / "verdicts.jsonl"
    with got.open("w") as out, (tmp_path / "log").open("w") as log:
        # From the first number on: whether it or the agent is up first does not matter.
        command = [*CLI, "subscribe", "--endpoint", endpoint, "--control", control, "--from-seq", "1", "--json"]
        subscriber = subprocess.Popen(command, stdout=out)
        agent = subprocess.Popen([*CLI, "run", "--config", str(tmp_path / "line.toml")], stderr=log)
        try:
            end = time.monotonic() + 600
            while (tmp_path / "log").read_text().count('"camera_at_end"') < len(FOLDERS) or lines(got) < total:
                assert time.monotonic() < end, (lines(got), (tmp_path / "log").read_text())
                assert agent.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            time.sleep(2.0)  # for one too many
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(60) == 0
        finally:
            agent.kill()
            subscriber.send_signal(signal.SIGINT)
            subscriber.wait(60)
    verdicts = [json.loads(line) for line in got.read_text().splitlines()]
    assert sorted(verdict["seq"] for verdict in verdicts) == list(range(1, total + 1))
    assert {verdict["result"] for verdict in verdicts} <= {"pass", "fail"}
    for name, count in counts.items():
        frames = [verdict["frame_id"] for verdict in verdicts if verdict["camera"] == name]
        assert sorted(frames) == list(range(count))


def lines(file: Path) -> int:
    """How many whole lines."""
    return file.read_text().count("\n")
