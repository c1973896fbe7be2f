"""The simulated line: a camera over a belt of drawn parts of one product, some of them with defects."""

import threading
import time
from queue import Empty, Full, Queue

import numpy as np

from flawline.camera.camera import Camera
from flawline.camera.families import FAMILIES
from flawline.camera.frame import Frame
from flawline.camera.pace import Pace
from flawline.camera.synthetic import Product, Sample, choose_product, draw_part
from flawline.config.errors import CameraError, ConfigError
from flawline.config.settings_camera import CameraSettings

_AHEAD = 4  # parts drawn before they are due


class SimulatedCamera(Camera):
    """Draws part after part. Frame n of a seed is always the same picture; a thread draws a few ahead."""

    loses_triggers = False

    def __init__(self, settings: CameraSettings) -> None:
        self.name = settings.name
        self._settings = settings.simulated
        family = self._settings.family
        if family is not None and family not in FAMILIES:
            raise ConfigError(
                f"camera {self.name!r}: simulated.family {family!r} is not known (there are: {', '.join(FAMILIES)})"
            )
        if settings.trigger == "hardware":
            raise ConfigError(f"camera {self.name!r}: backend 'simulated' has no trigger line; use free or software")
        self._by_command = settings.trigger == "software"
        self._triggers = threading.Semaphore(0)
        # Without a rate of its own a line would run as fast as it can be drawn and overrun every inspection.
        self._pace = Pace(None if self._by_command else settings.fps or 10.0)
        self._product: Product = choose_product(np.random.default_rng([self._settings.seed, 0]), family)
        self._next = 0
        self._drawn: Queue[tuple[int, Sample]] = Queue(_AHEAD)
        self._stop = threading.Event()
        self._painter: threading.Thread | None = None
        self._failure: Exception | None = None

    def open(self) -> None:
        """Start the thread that draws ahead; a reopened camera goes on with the next part, without old triggers."""
        self.close()
        self._triggers = threading.Semaphore(0)
        self._stop = threading.Event()
        self._drawn = Queue(_AHEAD)
        self._failure = None
        self._painter = threading.Thread(
            target=self._paint, args=(self._next, self._drawn, self._stop), name=f"painter-{self.name}", daemon=True
        )
        self._painter.start()
        self._pace.restart()

    def grab(self, timeout_s: float) -> Frame | None:
        """The next part, at the set rate or on a trigger."""
        deadline = time.monotonic() + timeout_s
        if self._by_command:
            if not self._triggers.acquire(timeout=timeout_s):
                return None
        elif not self._pace.wait(timeout_s):
            return None
        try:
            # A trigger that came is owed a frame: drawing is waited for beyond the timeout, but not for ever.
            frame_id, sample = self._drawn.get(timeout=max(10.0, deadline - time.monotonic()))
        except Empty:
            raise CameraError(
                f"camera {self.name!r}: no part was drawn within 10 s: {self._failure}"
            ) from self._failure
        self._next = frame_id + 1
        return Frame(
            frame_id,
            time.time_ns(),
            sample.image,
            source=f"simulated:{self._settings.seed}:{frame_id}",
            truth={
                "seed": self._settings.seed,
                "family": self._product.family,
                "object": sample.object,
                "good": not sample.defects,
                "defects": [{"kind": kind, "bbox": list(bbox)} for kind, bbox in sample.defects],
                "defect_px": int(np.count_nonzero(sample.mask)),
            },
        )

    def trigger(self) -> None:
        """Expose one more part."""
        self._triggers.release()

    def close(self) -> None:
        """Stop drawing."""
        self._stop.set()
        if self._painter is not None:
            self._painter.join(timeout=10.0)
            self._painter = None

    def info(self) -> dict[str, object]:
        """What is made on the line."""
        return {
            "model": "simulated",
            "family": self._product.family,
            "seed": self._settings.seed,
            "defect_rate": self._settings.defect_rate,
            "width": self._settings.width,
            "height": self._settings.height,
            "next": self._next,
        }

    def part(self, frame_id: int) -> Sample:
        """The part that frame `frame_id` shows, with its mask."""
        rng = np.random.default_rng([self._settings.seed, 1, frame_id])
        bad = rng.random() < self._settings.defect_rate
        return draw_part(
            rng,
            self._product,
            self._settings.height,
            self._settings.width,
            defects=int(rng.integers(1, 4)) if bad else 0,
        )

    def _paint(self, frame_id: int, drawn: Queue[tuple[int, Sample]], stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                item = (frame_id, self.part(frame_id))
                while not stop.is_set():
                    try:
                        drawn.put(item, timeout=0.2)
                        break
                    except Full:
                        continue
                frame_id += 1
        except Exception as error:  # told by `grab`, which would otherwise wait for nothing
            self._failure = error
