"""What the doctor says of driver, torch and USB, from what a machine would tell of itself."""

from pathlib import Path
from typing import Any

import pytest

from flawline.agent import doctor_machine
from flawline.config.settings import Settings
from flawline.config.settings_camera import CameraSettings

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
    findings = list(doctor_machine._torch(WELL | changes, driver, must))
    assert [finding.verdict for finding in findings] == verdicts
    assert says in findings[-1].found


@pytest.mark.parametrize(
    ("backend", "plugged", "lent", "verdicts"),
    [
        ("genicam", "ef", "16\n", ["warning"]),
        ("pylon", "ef", "1000\n", ["ok"]),
        ("gentl", "ef", "0\n", ["ok"]),  # as much as they like
        ("genicam", "08", "16\n", []),  # a stick: the cameras are GigE ones
        ("simulated", "ef", "16\n", []),
    ],
)
def test_usb_cameras_need_more_memory_than_the_kernel_lends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, plugged: str, lent: str, verdicts: list[str]
) -> None:
    interface = tmp_path / "bus/usb/devices/2-1:1.0"
    memory = tmp_path / "module/usbcore/parameters"
    for folder in (interface, memory):
        folder.mkdir(parents=True)
    (interface / "bInterfaceClass").write_text(f"{plugged}\n")
    (interface / "bInterfaceSubClass").write_text("05\n")
    (memory / "usbfs_memory_mb").write_text(lent)
    monkeypatch.setattr(doctor_machine, "_SYS", tmp_path)
    settings = Settings(cameras=[CameraSettings(name="top", backend=backend)])
    findings = list(doctor_machine.usb(settings))
    assert [finding.verdict for finding in findings] == verdicts
    for finding in findings:
        assert lent.strip() in finding.found or lent == "0\n"
        assert ("usbcore.usbfs_memory_mb=1024" in finding.remedy) == (finding.verdict == "warning")
