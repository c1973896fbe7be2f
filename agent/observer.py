"""Who looks on when a verdict is out: the metrics, the operators' page. None of them can hold up the line."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from flawline.agent.verdict import Job
from flawline.agent.wire import Header
from flawline.camera.ring import FrameRing

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class JudgedFrame:
    """A published header with what its slot holds. The arrays are valid during the call, or as long as held.

    A part has one `verdict`; the `late` result after an `error: deadline`, or the `refined` mask after a degraded
    verdict, may follow with the same `seq`.
    """

    kind: Literal["verdict", "late", "refined"]
    header: Header
    picture: NDArray[np.uint8] | None  # (H, W, 3) RGB; None where no frame came
    mask: NDArray[np.uint8] | None  # (H, W), 0 or 255; None where the frame was not judged
    anomaly_map: NDArray[np.uint8] | None  # (H, W), 255 for 1.0; None where the frame was not judged
    points: list[list[float]]  # x, y in pixels of the frame, and the label: 1 positive, 0 negative
    hold: Callable[[], Callable[[], None]]  # keeps the arrays valid until what it returns is called, on the loop


class Observer(Protocol):
    """Called on the event loop for every published header, in publish order. It must not block."""

    def judged(self, frame: JudgedFrame) -> None:
        """Take note of it."""


class Onlookers:
    """Passes what is published on to all observers. One that fails is logged, once until it works again."""

    def __init__(self, ring: FrameRing, observers: Iterable[Observer]) -> None:
        self._ring = ring
        self._observers = list(observers)
        self._failing: set[int] = set()

    def __call__(self, job: Job, header: Header) -> None:
        """The outbox calls this while the job's slot still is the job's."""
        frame = self._frame(job, header)
        for number, observer in enumerate(self._observers):
            try:
                observer.judged(frame)
            except Exception:
                if number not in self._failing:
                    log.exception("observer_failed", observer=type(observer).__name__)
                self._failing.add(number)
            else:
                self._failing.discard(number)

    def _frame(self, job: Job, header: Header) -> JudgedFrame:
        kind: Literal["verdict", "late", "refined"] = "verdict"
        if header is not job.verdict:
            kind = "late" if job.is_late else "refined"
        hold = partial(self._hold, job)
        if job.slot is None:
            return JudgedFrame(kind, header, None, None, None, [], hold)
        slot, shape = job.slot, (job.height, job.width)
        picture = self._ring.picture(slot, *shape)
        if header["result"] == "error":
            return JudgedFrame(kind, header, picture, None, None, [], hold)
        # A refinement has a mask plane of its own, so that the first mask stays what it was.
        refined = kind == "refined" or (job.held is not None and not header["degraded"])
        mask = self._ring.mask(slot, *shape, refined=refined)
        return JudgedFrame(kind, header, picture, mask, self._ring.anomaly_map(slot, *shape), job.points, hold)

    def _hold(self, job: Job) -> Callable[[], None]:
        """One more user of the job's slot, until what is returned is called."""
        job.holds += 1
        return partial(job.let_go, self._ring)
