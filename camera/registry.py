"""Which backend drives a camera: looked up by name and imported only when it is used."""

import sys
from importlib import import_module
from types import ModuleType

import structlog

from flawline.camera.camera import Camera
from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings

BACKENDS: dict[str, tuple[str, str]] = {
    "folder": ("flawline.camera.folder", "FolderCamera"),
    "simulated": ("flawline.camera.simulated", "SimulatedCamera"),
    "genicam": ("flawline.camera.genicam", "GenicamCamera"),
    "pylon": ("flawline.camera.pylon", "PylonCamera"),
    "gentl": ("flawline.camera.gentl", "GentlCamera"),
    "opencv": ("flawline.camera.opencv", "OpencvCamera"),
}
EXTRAS = {"genicam": "genicam", "pylon": "pylon", "gentl": "gentl"}
"""The pip extra that brings a backend's library, where it is not always there."""

_EVERY = {"name", "backend", "recipe", "trigger", "trigger_timeout_ms", "guard"}
_DEVICE = _EVERY | {"fps", "serial", "address", "user_name", "index", "features", "stall_s", "transfer_ms"}
USED: dict[str, set[str]] = {
    "simulated": _EVERY | {"fps", "simulated", "features"},
    "folder": _EVERY | {"fps", "path", "loop", "features"},
    "genicam": _DEVICE,
    "pylon": _DEVICE,
    "gentl": _DEVICE - {"address"} | {"cti"},  # a producer tells no address
    "opencv": _EVERY | {"fps", "path", "loop", "url", "index", "features", "stall_s"},
}
_HAS_NO_FEATURES = ("simulated", "folder")  # but a line's file may be tried with one of them in its camera's place
log = structlog.get_logger()


class LibraryMissing(ConfigError):
    """A backend's library is not installed on this machine."""


def make_camera(settings: CameraSettings) -> Camera:
    """The camera that `settings` describe, not yet open.

    Raises ConfigError where a key is wrong, missing, or set although the backend does not use it; LibraryMissing.
    """
    used = USED[settings.backend]
    for key in sorted(settings.model_fields_set - used):
        default = CameraSettings.model_fields[key].get_default(call_default_factory=True)
        if getattr(settings, key) != default:  # the effective configuration names every key
            raise ConfigError(f"camera {settings.name!r}: backend {settings.backend!r} does not use {key!r}")
    if settings.features and settings.backend in _HAS_NO_FEATURES:
        log.warning("features_not_set", camera=settings.name, backend=settings.backend)
    try:
        module = load_backend(settings.backend)
    except LibraryMissing as error:
        raise LibraryMissing(f"camera {settings.name!r}: {error}") from error
    camera: Camera = getattr(module, BACKENDS[settings.backend][1])(settings)
    return camera


def load_backend(name: str) -> ModuleType:
    """The backend's module. Raises LibraryMissing, naming the pip extra that brings it."""
    try:
        return import_module(BACKENDS[name][0])
    except ImportError as error:
        extra = EXTRAS.get(name)
        remedy = f"; install it with: {sys.executable} -m pip install 'flawline[{extra}]'" if extra else ""
        raise LibraryMissing(f"backend {name!r} needs a library that is not here ({error}){remedy}") from error
