"""What the doctor finds on a machine that is well, and on one that is not."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import write_tiny_bundle

from flawline.agent.doctor import _agent_is_running, _ports, _torch
from flawline.agent.journal import Journal
from flawline.config.sources import load_settings

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def doctor(config: Path, **environment: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Exit code, and findings by check."""
    done = subprocess.run(
        [*CLI, "doctor", "--config", str(config), "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | environment,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] == (done.returncode == 0)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return done.returncode, found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config(folder: Path, more: str = "", publish: int | None = None) -> Path:
    file = folder / "line.toml"
    file.write_text(
        f'[publish]\nendpoint = "tcp://127.0.0.1:{publish or free_port()}"\n'
        f'[control]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n'
        f'[preview]\nport = {free_port()}\n[journal]\npath = "state"\nmin_free_mb = 1\narchive_mb = 1\n' + more
    )
    return file


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "tiny")
    code, found = doctor(config(tmp_path, '[model]\nbundle = "tiny"\ndevice = "cpu"\n'), FLAWLINE_BUNDLES=str(tmp_path))
    assert code == 0, found
    assert {finding["verdict"] for check in ("bundle", "cameras", "ports", "disk") for finding in found[check]} == {
        "ok"
    }
    assert "torch 2" in found["torch"][0]["found"]
    assert len(found["ports"]) == 3


def test_the_running_agents_ports_are_its_own(tmp_path: Path) -> None:
    file = config(tmp_path, '[model]\ndevice = "cpu"\n')
    settings = load_settings(file, environ={})
    taken = int(settings.publish.endpoint.rsplit(":", 1)[1])
    journal = Journal(settings.journal.path / settings.station)  # holds the lock, as an agent does
    with socket.socket() as agents:
        agents.bind(("127.0.0.1", taken))
        agents.listen()
        findings = list(_ports(settings, _agent_is_running(settings)))
    assert [finding.verdict for finding in findings] == ["ok"] * 3
    assert "running agent's" in findings[0].found
    journal.close()


def test_each_fault_is_named_with_its_remedy(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    weights = next(path for path in sorted(bundle.rglob("*")) if path.suffix == ".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "token").write_text("abc")
    (tmp_path / "token").chmod(0o644)
    (tmp_path / "state").write_text("a file, no folder")
    cameras = '[[cameras]]\nname = "top"\nbackend = "folder"\npath = "nowhere"\n'
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        file = config(tmp_path, '[model]\nbundle = "tiny"\ndevice = "cuda"\n' + cameras, publish=port)
        file.write_text(file.read_text().replace("[preview]\n", '[preview]\ntoken_file = "token"\n'))
        code, found = doctor(file, FLAWLINE_BUNDLES=str(tmp_path))
    failed = {
        check: next(finding for finding in findings if finding["verdict"] == "fail")
        for check, findings in found.items()
        if any(finding["verdict"] == "fail" for finding in findings)
    }
    assert code == 1
    assert {"bundle", "cameras", "ports"} <= failed.keys()
    assert weights.name in failed["bundle"]["found"]
    assert "nowhere" in failed["cameras"]["found"]
    assert f"sport = :{port}" in failed["ports"]["remedy"]
    remedies = [finding["remedy"] for finding in found["permissions"]]
    assert f"chmod 600 {tmp_path / 'token'}" in remedies
    assert all(finding["remedy"] for finding in failed.values())


def test_a_configuration_that_does_not_load_is_exit_2(tmp_path: Path) -> None:
    file = config(tmp_path, "[modle]\n")
    done = subprocess.run([*CLI, "doctor", "--config", str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "did you mean 'model'" in done.stderr


WELL: dict[str, Any] = {
    "torch": "2.9.0+cu126",
    "built_for": "12.6",
    "sees": True,
    "gpus": ["NVIDIA RTX A2000"],
    "architectures": ["sm_80", "sm_90", "compute_90"],
    "capabilities": [[8, 6]],
}


@pytest.mark.parametrize(
    ("changes", "driver", "must", "verdicts", "says"),
    [
        ({}, "550.54", True, ["ok"], "sees NVIDIA RTX A2000"),
        ({"capabilities": [[12, 0]]}, "580.1", True, ["ok"], "sees"),  # PTX is compiled for later GPUs
        ({"capabilities": [[6, 1]]}, "550.54", True, ["ok", "fail"], "sm_61"),
        ({"sees": False, "gpus": [], "capabilities": []}, "470.1", False, ["fail"], "too old"),
        (
            {"sees": False, "built_for": None, "gpus": [], "capabilities": []},
            "550.54",
            False,
            ["warning"],
            "there is a GPU",
        ),
        (
            {"sees": False, "built_for": None, "gpus": [], "capabilities": []},
            "550.54",
            True,
            ["fail"],
            "there is a GPU",
        ),
        ({"sees": False, "gpus": [], "capabilities": []}, None, False, ["ok"], "built for CUDA 12.6"),
    ],
)
def test_torch_is_held_against_driver_and_gpu(
    changes: dict[str, Any], driver: str | None, must: bool, verdicts: list[str], says: str
) -> None:
    findings = list(_torch(WELL | changes, driver, must))
    assert [finding.verdict for finding in findings] == verdicts
    assert says in findings[-1].found
