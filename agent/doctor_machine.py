"""What `flawline doctor` finds of the machine: libraries, driver and torch, network and USB, clock.

Nothing here loads torch: what only torch can tell is asked of a child process.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flawline.config.settings import Settings

Verdict = Literal["ok", "warning", "fail"]
_OPENCV_NEEDS = {"libGL.so.1": "libgl1", "libglib-2.0.so.0": "libglib2.0-0"}  # library: Debian's package
_SOCKET_BUFFER = 8 << 20  # bytes: some GigE frames that wait while the camera's thread is not scheduled
_GIGE = ("genicam", "pylon", "gentl")
_USB_MEMORY_MB = 256  # some frames of each camera, and the library's own transfers
_SYS = Path("/sys")
_TORCH_TELLS = """
import json, torch
print(json.dumps({"torch": torch.__version__, "built_for": torch.version.cuda, "sees": torch.cuda.is_available(),
    "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    "architectures": torch.cuda.get_arch_list(),
    "capabilities": [list(torch.cuda.get_device_capability(n)) for n in range(torch.cuda.device_count())]}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is empty where nothing is to be done."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def table(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def libraries() -> Iterator[Finding]:
    for library, package in _OPENCV_NEEDS.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            yield Finding("libraries", "fail", f"{library} is missing; opencv needs it", f"apt install {package}")
        else:
            yield Finding("libraries", "ok", f"{library} is there")


def gpu(settings: Settings) -> Iterator[Finding]:
    must = settings.model.device.startswith("cuda")
    driver = _driver()
    if driver is None:
        verdict: Verdict = "fail" if must else "warning"
        remedy = "apt install nvidia-driver (from non-free), then restart"
        yield Finding("gpu", verdict, "no NVIDIA driver is loaded; the CPU would judge", remedy)
    else:
        yield Finding("gpu", "ok", f"NVIDIA driver {driver}")
        if not Path("/dev/nvidia-uvm").exists():
            yield Finding(
                "gpu", "fail", "/dev/nvidia-uvm is missing", "apt install nvidia-modprobe; nvidia-modprobe -u -c 0"
            )
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_TELLS], capture_output=True, text=True, timeout=300, check=True
        )
        torch = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        yield Finding(
            "torch",
            "fail",
            f"torch cannot be loaded: {' '.join(said)}",
            f"{sys.executable} -m pip install --force-reinstall torch torchvision",
        )
        return
    yield from _torch(torch, driver, must)


def _driver() -> str | None:
    """The loaded driver's version."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "of unknown version"


def _torch(torch: dict[str, Any], driver: str | None, must: bool) -> Iterator[Finding]:
    """`torch` is what the child process said; `driver` is the loaded driver's version."""
    build = f"torch {torch['torch']}, built for {'CUDA ' + torch['built_for'] if torch['built_for'] else 'the CPU'}"
    if torch["sees"]:
        yield Finding("torch", "ok", f"{build}, sees {', '.join(torch['gpus'])}")
        for name, capability in zip(torch["gpus"], torch["capabilities"], strict=True):
            if not _is_built_for(torch["architectures"], *capability):
                where = "https://pytorch.org/get-started/locally/ names builds for older GPUs"
                found = f"{name} (sm_{capability[0]}{capability[1]}) is not in this build: {torch['architectures']}"
                yield Finding("torch", "fail", found, where)
    elif driver is None:
        yield Finding("torch", "ok", build)
    elif torch["built_for"] is None:
        remedy = f"{sys.executable} -m pip install torch --index-url https://download.pytorch.org/whl/cu126"
        yield Finding("torch", "fail" if must else "warning", f"{build}, but there is a GPU", remedy)
    else:
        found = f"{build}, does not see the GPU: driver {driver} is too old for it, or the nodes are not open to us"
        remedy = (
            f"update the driver, or install a torch for an older CUDA than {torch['built_for']}; ls -l /dev/nvidia*"
        )
        yield Finding("torch", "fail", found, remedy)


def _is_built_for(architectures: list[str], major: int, minor: int) -> bool:
    """Binaries run on the same major and a minor at least theirs; PTX (`compute_`) is compiled for later ones."""
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if found is None:
            continue
        kind, there = found.group(1), (int(found.group(2)), int(found.group(3)))
        if (there[0] == major and there[1] <= minor) or (kind == "compute" and there <= (major, minor)):
            return True
    return False


def network(settings: Settings) -> Iterator[Finding]:
    if not any(camera.backend in _GIGE for camera in settings.cameras):
        return
    most = _number("/proc/sys/net/core/rmem_max")
    if most is not None and most < _SOCKET_BUFFER:
        found = f"sockets may buffer {most} bytes; GigE cameras lose packets below {_SOCKET_BUFFER}"
        yield Finding(
            "network", "warning", found, f"sysctl -w net.core.rmem_max={_SOCKET_BUFFER} (and in /etc/sysctl.d)"
        )
    elif most is not None:
        yield Finding("network", "ok", f"sockets may buffer {most} bytes")
    for interface in sorted(Path("/sys/class/net").glob("*")):
        mtu, kind = _number(interface / "mtu"), _number(interface / "type")
        up = (interface / "operstate").read_text().strip() == "up" if (interface / "operstate").exists() else False
        if not up or kind != 1 or mtu is None:  # 1: Ethernet
            continue
        if mtu < 8000:
            remedy = f"ip link set {interface.name} mtu 9000, if cameras hang on it and its switch takes jumbo frames"
            yield Finding("network", "warning", f"{interface.name}: MTU {mtu}, no jumbo frames", remedy)
        else:
            yield Finding("network", "ok", f"{interface.name}: MTU {mtu}")


def usb(settings: Settings) -> Iterator[Finding]:
    """The kernel lends all programs together so much memory for transfers; 0 is as much as they like."""
    named = any((camera.address or "").lower().startswith("usb") for camera in settings.cameras)
    if not named and not (any(camera.backend in _GIGE for camera in settings.cameras) and _has_usb_camera()):
        return
    lent = _number(_SYS / "module/usbcore/parameters/usbfs_memory_mb")
    if lent is not None and 0 < lent < _USB_MEMORY_MB:
        found = f"USB transfers may take {lent} MB together; USB3 Vision cameras lose frames below {_USB_MEMORY_MB}"
        remedy = f"usbcore.usbfs_memory_mb={_USB_MEMORY_MB * 4} in the kernel's command line, then restart"
        yield Finding("usb", "warning", found, remedy)
    elif lent is not None:
        yield Finding("usb", "ok", f"USB transfers may take {f'{lent} MB together' if lent else 'what they like'}")


def _has_usb_camera() -> bool:
    """Whether a USB3 Vision interface is plugged in: class 0xEF, subclass 0x05."""
    interfaces = (_SYS / "bus/usb/devices").glob("*/bInterfaceClass")
    return any(_text(one) == "ef" and _text(one.parent / "bInterfaceSubClass") == "05" for one in interfaces)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _number(file: str | Path) -> int | None:
    try:
        return int(Path(file).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class _Timex(ctypes.Structure):
    """The head of struct timex (adjtimex(2)); the rest is room for what the kernel writes behind it."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock() -> Iterator[Finding]:
    times = _Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(times))  # modes = 0: only reads
    if state < 0:
        yield Finding("clock", "warning", f"the kernel does not tell: {os.strerror(ctypes.get_errno())}")
    elif state == 5 or times.status & 0x40:  # TIME_ERROR, STA_UNSYNC
        remedy = "apt install chrony (or systemd-timesyncd), and name the plant's time server"
        yield Finding("clock", "warning", "the clock is not synchronised: verdicts' times cannot be compared", remedy)
    else:
        yield Finding("clock", "ok", f"synchronised, within {times.maxerror / 1000:.0f} ms at most")
