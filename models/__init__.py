"""Models: bundles, CLIP, SAM, their collaboration, and the worker process that holds them.

Importing this package does not import torch; `Inspector` does, on first use.
"""

from typing import TYPE_CHECKING, Any

from flawline.models.results import CascadeStage, Defect, InspectionResult, InspectionTrace

if TYPE_CHECKING:
    from flawline.models.inspector import Inspector

__all__ = ["CascadeStage", "Defect", "InspectionResult", "InspectionTrace", "Inspector"]


def __getattr__(name: str) -> Any:
    if name == "Inspector":
        from flawline.models.inspector import Inspector

        return Inspector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
