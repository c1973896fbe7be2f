"""Which backend drives a camera: looked up by name and imported only when it is used."""

from importlib import import_module

from flawline.camera.camera import Camera
from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings

BACKENDS: dict[str, tuple[str, str]] = {
    "folder": ("flawline.camera.folder", "FolderCamera"),
    "simulated": ("flawline.camera.simulated", "SimulatedCamera"),
}


def make_camera(settings: CameraSettings) -> Camera:
    """The camera that `settings` describe, not yet open. Raises ConfigError where its backend cannot be had."""
    if settings.backend not in BACKENDS:
        there = ", ".join(sorted(BACKENDS))
        raise ConfigError(
            f"camera {settings.name!r}: backend {settings.backend!r} is not built yet (there is: {there})"
        )
    module_name, class_name = BACKENDS[settings.backend]
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"camera {settings.name!r}: backend {settings.backend!r} needs the Python module {error.name!r}"
        ) from error
    camera: Camera = getattr(module, class_name)(settings)
    return camera
