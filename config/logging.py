"""Set-up of structlog: readable on a terminal, one JSON object a line elsewhere, always on stderr."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from flawline.config.settings import LogSettings

SECRET_KEYS = ("token", "secret", "password")


def _mask_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in event:
        if any(word in key.lower() for word in SECRET_KEYS):
            event[key] = "***"
    return event


def set_up_logging(settings: LogSettings, **bound: str) -> None:
    """Configure structlog for this process; `bound` (station, process) stands in every line."""
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    render: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _mask_secrets,
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
