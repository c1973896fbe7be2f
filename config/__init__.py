"""Configuration: the settings tree, recipes, the error hierarchy and logging."""

from flawline.config.errors import BundleError
from flawline.config.recipe import Recipe

__all__ = ["BundleError", "Recipe"]
