"""Which backend drives a camera: looked up by name and imported only when it is used."""

from importlib import import_module

from flawline.camera.camera import Camera
from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings

BACKENDS: dict[str, tuple[str, str]] = {
    "simulated": ("flawline.camera.simulated", "SimulatedCamera"),
    "folder": ("flawline.camera.folder", "FolderCamera"),
    "genicam": ("flawline.camera.genicam", "GenicamCamera"),
    "pylon": ("flawline.camera.pylon", "PylonCamera"),
    "gentl": ("flawline.camera.gentl", "GentlCamera"),
    "opencv": ("flawline.camera.video", "VideoCamera"),
}
EXTRAS = {"genicam": "genicam", "pylon": "pylon", "gentl": "gentl"}


def make_camera(settings: CameraSettings) -> Camera:
    """The camera that `settings` describe, not yet open. Raises ConfigError where its library is missing."""
    module_name, class_name = BACKENDS[settings.backend]
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(settings.backend)
        remedy = f": pip install 'flawline[{extra}]'" if extra else ""
        raise ConfigError(
            f"camera {settings.name!r}: backend {settings.backend!r} needs the Python module {error.name!r}{remedy}"
        ) from error
    camera: Camera = getattr(module, class_name)(settings)
    return camera
