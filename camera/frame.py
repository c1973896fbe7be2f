"""The frame as a camera hands it over, before it is written into the ring."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

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
    pixels: Pixels | None  # (H, W), (H, W, 2 to 4) or, packed, (N,), uint8 or uint16: see `PixelFormat`
    pixel_format: str = "RGB8"  # GenICam's name: Mono8, Mono12, RGB8, BGR8, BayerRG8, ...
    fault: str | None = None  # in words, naming the file or the camera
    fault_reason: Literal["bad_frame", "camera_fault", "overrun"] = "bad_frame"  # the wire's word
    source: str | None = None  # where it came from, when that has a name (a file)
    truth: dict[str, Any] = field(default_factory=dict)  # simulated line only: what is really on the part
    clocked: bool = False  # `t_grab` is the camera's own clock, mapped
    lost: bool = False  # known only by the gap in the numbers: no part of it is here, `mono_grab` is the next frame's
    mono_grab: int = field(default_factory=time.monotonic_ns)  # `t_grab` on the monotonic clock, ns: for comparing
    extent: tuple[int, int] | None = None  # height and width in pixels where `pixels` is packed bytes

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; (0, 0) where there is no picture."""
        if self.extent is not None:
            return self.extent
        return (0, 0) if self.pixels is None else (self.pixels.shape[0], self.pixels.shape[1])
