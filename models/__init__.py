"""Models: what an inspection returns, what judges, and the worker process that holds it. No torch at import."""

from flawline.models.results import CascadeStage, Defect, InspectionResult, InspectionTrace

__all__ = ["CascadeStage", "Defect", "InspectionResult", "InspectionTrace"]
