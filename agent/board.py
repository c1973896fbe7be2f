"""What the operators' page shows beside the video: last verdicts, counters of the shift, last failed parts."""

import math
import time
from collections import Counter, OrderedDict, deque
from datetime import datetime, timedelta
from typing import Any

from flawline.agent.fail import Fail
from flawline.agent.wire import Header
from flawline.config.settings_preview import PreviewSettings

HISTORY = 240
"""Verdicts per camera that the page plots."""
_FAILS_PER_S = 4.0
"""Failed parts that are copied at most per second and camera: when every part fails, the last ones tell enough."""


class Board:
    """Everything it keeps is bounded. Verdicts are counted through, so that every page knows which ones it has."""

    def __init__(self, settings: PreviewSettings, cameras: list[str]) -> None:
        self._settings = settings
        self.history: dict[str, deque[dict[str, Any]]] = {name: deque(maxlen=HISTORY) for name in cameras}
        self.fails: OrderedDict[int, Fail] = OrderedDict()
        self._copied_at: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self.per_camera: dict[str, Counter[str]] = {name: Counter() for name in cameras}
        self.since = time.time()
        self._until = self._shift(self.since)[1]
        self.number = 0

    def note(self, header: Header) -> None:
        """Take note of one verdict; of cameras that are not configured any more, whose triggers are owed one, none."""
        if header["camera"] not in self.history:
            return
        self.number += 1
        self._turn_shift()
        camera, result = header["camera"], header["result"]
        self.counts[result] += 1
        self.per_camera[camera][result] += 1
        self.history[camera].append(
            {
                "n": self.number,
                **{key: header[key] for key in ("seq", "camera", "result", "reason", "score", "threshold", "degraded")},
                **{key: header[key] for key in ("frame_id", "part_id", "t_publish", "deadline_ms")},
                "recipe": header["recipe"]["id"],
                "defects": len(header["defects"]),
                "total_ms": header["stage_ms"].get("total"),
                "t_trigger": header["t_trigger"],
            }
        )

    def agrees(self, header: Header) -> bool:
        """Whether a refined result is the one that was published of its part."""
        told = next(
            (entry for entry in reversed(self.history[header["camera"]]) if entry["seq"] == header["seq"]), None
        )
        return told is not None and told["result"] == header["result"]

    def is_newest(self, header: Header) -> bool:
        """Whether no later part of the camera has its verdict."""
        return bool(self.history[header["camera"]][-1]["seq"] == header["seq"])

    def wants(self, header: Header) -> bool:
        """Whether a copy of the failed part is to be kept: not of every one where every part fails."""
        if header["result"] != "fail":
            return False
        now = time.monotonic()
        if header["seq"] not in self.fails and now - self._copied_at.get(header["camera"], -1e9) < 1.0 / _FAILS_PER_S:
            return False
        self._copied_at[header["camera"]] = now
        return True

    def keep(self, fail: Fail) -> None:
        """Keep a failed part among the last ones; what is refined replaces what was there."""
        self.fails[fail.header["seq"]] = fail
        while len(self.fails) > self._settings.fails_kept:
            self.fails.popitem(last=False)

    def since_event(self, number: int) -> list[dict[str, Any]]:
        """The verdicts that came after that event, oldest first, as far as they are kept."""
        news: list[dict[str, Any]] = []
        for history in self.history.values():
            for entry in reversed(history):
                if entry["n"] <= number:
                    break
                news.append(entry)
        return sorted(news, key=lambda entry: entry["n"])

    def summary(self) -> dict[str, Any]:
        """Counters of the shift and the numbers of the failed parts that are kept, newest first."""
        self._turn_shift()
        return {
            "since": self.since,
            "counts": {result: self.counts[result] for result in ("pass", "fail", "error")},
            "per_camera": {
                name: {result: counts[result] for result in ("pass", "fail", "error")}
                for name, counts in self.per_camera.items()
            },
            "fails": [
                {"seq": seq, "camera": fail.header["camera"], "score": fail.header["score"]}
                | {"t": fail.header["t_publish"]}
                for seq, fail in reversed(self.fails.items())
            ],
        }

    def _turn_shift(self) -> None:
        """Start the counters again where a shift has begun; once, however many have passed since the last look.

        So too where the clock was ahead and has been set back: else they would count on until then.
        """
        now = time.time()
        if self.since <= now < self._until or not self._settings.shifts:
            return
        self.since, self._until = self._shift(now)
        self.counts.clear()
        for counts in self.per_camera.values():
            counts.clear()

    def _shift(self, at: float) -> tuple[float, float]:
        """When the shift of that moment began and ends, by the local times of day; Unix times."""
        moment = datetime.fromtimestamp(at)
        starts = []
        for text in self._settings.shifts:
            hour, minute = (int(part) for part in text.split(":"))
            today = moment.replace(hour=hour, minute=minute, second=0, microsecond=0)
            starts += [(today + timedelta(days=days)).timestamp() for days in (-1, 0, 1)]
        began = [start for start in starts if start <= at]
        return max(began, default=at), min((start for start in starts if start > at), default=math.inf)
