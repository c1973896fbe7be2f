"""Models: what an inspection returns, what judges, and the worker process that holds it. No torch at import."""

from typing import TYPE_CHECKING, Any

from flawline.models.results import CascadeStage, Defect, InspectionResult, InspectionTrace

if TYPE_CHECKING:
    from flawline.models.inspector import Inspector

__all__ = ["CascadeStage", "Defect", "InspectionResult", "InspectionTrace", "Inspector"]


def __getattr__(name: str) -> Any:
    """`Inspector` brings torch along, so it is imported only when asked for."""
    if name == "Inspector":
        from flawline.models.inspector import Inspector

        return Inspector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
