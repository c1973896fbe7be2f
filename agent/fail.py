"""A failed part as the page's list keeps it: packed as picture files, because two dozen raw copies take much memory."""

from dataclasses import dataclass, replace
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.agent import shot
from flawline.agent.shot import Shot
from flawline.agent.wire import Header


@dataclass(frozen=True, slots=True)
class Fail:
    """Files of one failed part: some hundred kilobytes where the raw planes are megabytes."""

    header: Header
    drawing: str  # see `shot.overlay`
    frame_size: tuple[int, int]  # W, H of the captured frame, px
    thumbnail: bytes  # JPEG, marked
    picture: bytes  # JPEG
    mask: bytes | None  # PNG, 0 or 255
    anomaly_map: bytes | None  # PNG, 255 for 1.0

    @classmethod
    def of(cls, taken: Shot) -> Self:
        """Pack. For a thread: it takes some ten milliseconds."""
        mask = None if taken.mask is None else np.where(taken.mask > 0, 255, 0).astype(np.uint8)
        return cls(
            taken.header,
            shot.overlay(taken, 0),
            taken.frame_size,
            shot.jpeg(shot.thumbnail(taken), 75),
            shot.jpeg(taken.picture, 90),
            None if mask is None else shot.png(mask),
            None if taken.anomaly_map is None else shot.png(taken.anomaly_map),
        )

    def file(self, name: str) -> bytes | None:
        """`thumb.jpg`, `picture.jpg`, `marked.jpg`, `map.png` or `mask.png`; None where there is none."""
        match name:
            case "thumb.jpg":
                return self.thumbnail
            case "picture.jpg":
                return self.picture
            case "marked.jpg":
                return shot.jpeg(shot.marked(self._unpacked()), 90)
            case "map.png":
                return None if self.anomaly_map is None else shot.png(shot.heat(_grey(self.anomaly_map)))
            case "mask.png":
                return self.mask
        return None

    def _unpacked(self) -> Shot:
        picture = np.asarray(cv2.imdecode(np.frombuffer(self.picture, np.uint8), cv2.IMREAD_COLOR), np.uint8)
        rgb = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
        bare = Shot(self.header, self.frame_size, rgb, None, None, [])
        return bare if self.mask is None else replace(bare, mask=_grey(self.mask))


def _grey(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)
