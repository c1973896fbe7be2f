"""Configuration: the settings tree, recipes, the error hierarchy and logging."""

from flawline.config.errors import (
    BundleError,
    CameraError,
    ConfigError,
    FlawlineError,
    ImageError,
    JournalError,
    RingError,
    WorkerError,
)
from flawline.config.recipe import Recipe

__all__ = [
    "BundleError",
    "CameraError",
    "ConfigError",
    "FlawlineError",
    "ImageError",
    "JournalError",
    "Recipe",
    "RingError",
    "WorkerError",
]
