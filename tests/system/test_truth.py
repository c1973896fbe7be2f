"""The simulated line's ground truth stands in the agent's log, every frame once, and is what was really drawn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from station import free_port

from flawline.camera.registry import make_camera
from flawline.camera.simulated import SimulatedCamera
from flawline.config.settings_camera import CameraSettings

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]
CAMERA = {"name": "belt", "backend": "simulated", "fps": 50.0}
LINE = {"seed": 7, "width": 96, "height": 64, "family": "plate", "defect_rate": 0.5}
FRAMES = 24
"""More than the log lets through of a line that merely repeats."""


def test_the_log_says_what_was_drawn_once_a_frame(tmp_path: Path) -> None:
    config = tmp_path / "line.toml"
    config.write_text(
        "[[cameras]]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in CAMERA.items())
        + "[cameras.simulated]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in LINE.items())
        + f'[publish]\nendpoint = "ipc://{tmp_path}/verdicts"\n[control]\nendpoint = "ipc://{tmp_path}/control"\n'
        f'[journal]\npath = "state"\n[preview]\nport = {free_port()}\n[log]\nformat = "json"\n'
        '[worker]\nengine = "flawline.models.noop:NoopEngine"\n'
    )
    command = [*CLI, "run", "--config", str(config), "--frames", str(FRAMES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    truth = [event for event in said if event["event"] == "truth"]
    assert [event["frame_id"] for event in truth] == list(range(FRAMES))
    assert {event["camera"] for event in truth} == {"belt"}
    again = make_camera(CameraSettings.model_validate(CAMERA | {"simulated": LINE}))
    assert isinstance(again, SimulatedCamera)
    for event in truth:
        part = again.part(event["frame_id"])
        assert event["defect_px"] == int(np.count_nonzero(part.mask))
        assert event["good"] == (event["defect_px"] == 0)
        assert [(one["kind"], tuple(one["bbox"])) for one in event["defects"]] == part.defects
        for one in event["defects"]:
            x, y, w, h = one["bbox"]
            assert part.mask[y : y + h, x : x + w].any()
    assert {event["good"] for event in truth} == {True, False}
