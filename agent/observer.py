"""Who looks on when a verdict is out: the metrics, the operators' page. None of them can hold up the line."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from flawline.agent.wire import Header

log = structlog.get_logger()


class Observer(Protocol):
    """Called once for every published verdict, in publish order, on the event loop."""

    def judged(
        self,
        header: Header,
        picture: NDArray[np.uint8] | None,
        mask: NDArray[np.uint8] | None,
        anomaly_map: NDArray[np.uint8] | None,
        points: list[list[float]],
    ) -> None:
        """A verdict with (H, W, 3) RGB, (H, W) 0 or 255, (H, W) 255 for 1.0, and prompt points [x, y, label].

        The arrays are views of the frame's slot and valid only during the call: copy what is kept. `picture` is
        None where no frame came; `mask` and `anomaly_map` are None where the frame was not judged.
        """


class Observers:
    """Passes each verdict on to all observers. One that fails is logged, once until it works again."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = list(observers)
        self._failing: set[int] = set()

    def add(self, observer: Observer) -> None:
        """From now on it looks on too."""
        self._observers.append(observer)

    def judged(self, header: Header, *views: Any) -> None:
        """See `Observer.judged`."""
        for number, observer in enumerate(self._observers):
            try:
                observer.judged(header, *views)
            except Exception:
                if number not in self._failing:
                    log.exception("observer_failed", observer=type(observer).__name__)
                self._failing.add(number)
            else:
                self._failing.discard(number)
