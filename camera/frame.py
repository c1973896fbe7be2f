"""The frame as a camera hands it over, before it is written into the ring."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Frame:
    """One exposure.

    `pixels` may be a view into the driver's buffer: it is valid until the next `grab` or `close` of the
    camera that returned it. Where the exposure exists but cannot be judged (unreadable file, incomplete
    transfer), `pixels` is None and `fault` says why; such a frame is still owed a verdict.
    """

    frame_id: int  # the camera's own frame or block number
    t_grab: int  # UTC, ns: when the exposure arrived, or the camera's clock mapped to UTC
    pixels: Pixels | None  # (H, W) or (H, W, 3), uint8 or uint16
    pixel_format: str = "RGB8"  # GenICam's name: Mono8, Mono12, RGB8, BGR8, BayerRG8, ...
    fault: str | None = None  # in words, naming the file or the camera
    fault_reason: str = "bad_frame"  # the wire's word: `bad_frame` or `camera_fault`
    source: str | None = None  # where it came from, when that has a name (a file)
    truth: dict[str, Any] = field(default_factory=dict)  # simulated line only: what is really on the part
