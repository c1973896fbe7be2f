"""What is connected, and which of it the settings mean."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flawline.config.errors import CameraError, ConfigError
from flawline.config.settings_camera import CameraSettings


@dataclass(frozen=True, slots=True)
class Device:
    """One camera that a backend sees. Texts are empty where they are not known."""

    backend: str
    index: int  # its place in the backend's list; V4L2: the node's number
    vendor: str = ""
    model: str = ""
    serial: str = ""
    user_name: str = ""
    address: str = ""  # IP address, or the path or URL that opens it
    mac: str = ""
    access: str = ""  # `free`, or who holds it

    def table(self) -> dict[str, Any]:
        """For `cameras list --json`."""
        return asdict(self)

    def __str__(self) -> str:
        what = " ".join(text for text in (self.vendor, self.model) if text) or "camera"
        names = [text for text in (self.serial and f"serial {self.serial}", self.address, self.user_name) if text]
        return f"{what} ({', '.join(names) or f'index {self.index}'})"


def choose(settings: CameraSettings, devices: Sequence[Device]) -> Device:
    """The one device that fits serial, address, user_name and index, as far as they are given.

    Raises CameraError where there is none (it may be off, and come back), ConfigError where there are several.
    """
    wanted = {
        key: value
        for key in ("serial", "address", "user_name", "index")
        if (value := getattr(settings, key)) is not None
    }
    fitting = [device for device in devices if all(_fits(device, key, value) for key, value in wanted.items())]
    asked = ", ".join(f"{key} = {value!r}" for key, value in wanted.items())
    seen = "; ".join(str(device) for device in devices[:8]) or "none"
    if not fitting:
        what = f"no {settings.backend} camera answers with {asked}" if wanted else "no camera answers"
        raise CameraError(f"camera {settings.name!r}: {what}; cameras that do: {seen}")
    if len(fitting) > 1:
        raise ConfigError(
            f"camera {settings.name!r}: {len(fitting)} cameras answer{f' to {asked}' if asked else ''}; "
            f"choose one by serial, {'address, ' if any(device.address for device in devices) else ''}"
            f"user_name or index: {seen}"
        )
    return fitting[0]


def _fits(device: Device, key: str, value: str | int) -> bool:
    if key == "address":
        asked = str(value).lower()
        return asked == device.address.lower() or (device.mac != "" and _digits(asked) == _digits(device.mac.lower()))
    return bool(getattr(device, key) == value)


def _digits(mac: str) -> str:
    """A MAC address without what stands between its bytes."""
    return mac.replace(":", "").replace("-", "")
