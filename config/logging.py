"""Set-up of structlog: readable on a terminal, one JSON object a line elsewhere, always on stderr.

In a service each line begins with its priority as `<N>`, which journald takes off again and keeps as PRIORITY, so
that `journalctl -p warning` works and `journalctl -o cat` still shows nothing but JSON.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import structlog

from flawline.config.passwords import hide_passwords
from flawline.config.settings import LogSettings

_SECRET_NAME = re.compile(r"token|secret|password|passphrase|private_?key|credential", re.IGNORECASE)
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # syslog(3)
Event = MutableMapping[str, Any]


def _mask_secrets(_: Any, __: str, event: Event) -> Event:
    for key, value in event.items():
        event[key] = _without_secrets(key, value)
    return event


def _without_secrets(key: str, value: Any) -> Any:
    if _SECRET_NAME.search(key):
        return "***"
    if isinstance(value, str):
        return hide_passwords(value)
    if isinstance(value, Mapping):
        return {inner: _without_secrets(str(inner), item) for inner, item in value.items()}
    return [_without_secrets("", item) for item in value] if isinstance(value, list | tuple) else value


RECORDS = frozenset({"truth"})
"""Events that are data, one a frame, for whoever counts them: all or none."""


class RateLimit:
    """Lets a few lines of one kind through a window, then counts; the next line of that kind says how many were kept
    back. A kind is an event with its level, camera, reason and recipe. `RECORDS` pass as they are."""

    def __init__(
        self, most: int = 10, window_s: float = 60.0, now: Callable[[], float] = time.monotonic, kinds: int = 1000
    ) -> None:
        self._most, self._window_s, self._now, self._kinds = most, window_s, now, kinds
        self._seen: dict[tuple[Any, ...], list[float]] = {}  # kind -> [start of the window, lines, kept back]

    def __call__(self, _: Any, method: str, event: Event) -> Event:
        """structlog's processor. Raises DropEvent."""
        if event.get("event") in RECORDS:
            return event
        kind = (event.get("event"), method, *(str(event.get(key)) for key in ("camera", "reason", "recipe")))
        now = self._now()
        if kind not in self._seen and len(self._seen) >= self._kinds:
            self._seen.clear()
        seen = self._seen.setdefault(kind, [now, 0, 0])
        if now - seen[0] >= self._window_s:
            if seen[2]:
                event["repeats_kept_back"] = int(seen[2])
            seen[:] = [now, 0, 0]
        seen[1] += 1
        if seen[1] > self._most:
            seen[2] += 1
            raise structlog.DropEvent
        return event


def _add_priority(_: Any, method: str, line: Any) -> str:
    priority = _PRIORITY.get("error" if method == "exception" else method, 6)
    return f"<{priority}>{line}"


def to_journald() -> bool:
    """True where stderr is systemd's journal: JOURNAL_STREAM names its device and inode."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up_logging(settings: LogSettings, **bound: str) -> None:
    """Configure structlog for this process; `bound` (station, process) stands in every line."""
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    colours = sys.stderr.isatty()
    render: list[Any] = (
        [
            _mask_secrets,
            structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=structlog.dev.plain_traceback),
        ]
        if console
        else [  # the traceback before the passwords are taken out
            structlog.processors.format_exc_info,
            _mask_secrets,
            structlog.processors.JSONRenderer(default=str),
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            RateLimit(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *render,
            *([_add_priority] if to_journald() else []),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
