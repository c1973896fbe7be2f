"""The outline of a defect, as whoever marks it in a picture draws it: around its marks, without small holes."""

import cv2
import numpy as np
from numpy.typing import NDArray

WIDEST = 0.05  # of the picture's shorter side: marks farther apart than twice this are not joined
HOLE = 4.0  # a hole of up to this times `gap` times the changed area is filled; a larger one is a place left whole
SPECK = 0.03  # of the largest part: a smaller one is no part of the defect


def outlined(changed: NDArray[np.uint8], gap: float, edge: int) -> NDArray[np.uint8]:
    """Where a defect is, from where it changed the picture; (h, w), 0 or 1, of a picture whose shorter side is `edge`.

    A pixel of a rust stain or a scuff that happens to have the surface's own colour belongs to it all the same, and so
    does the middle of a dent, of which only one side is lit and one in shade. `gap` says how far apart marks of this
    kind lie, as a share of the square root of their area: so far they are grown, joined, and shrunk again. Small
    holes are filled; specks are dropped, which alone nobody would mark.
    """
    area = int(changed.sum())
    reach = round(min(gap * float(area) ** 0.5, WIDEST * edge))
    joined = changed
    if reach:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        wide = cv2.copyMakeBorder(changed, *(reach,) * 4, cv2.BORDER_CONSTANT, value=0)
        joined = cv2.morphologyEx(wide, cv2.MORPH_CLOSE, kernel)[reach:-reach, reach:-reach].copy()
    height, width = joined.shape
    _, labels, holes, _ = cv2.connectedComponentsWithStats(1 - joined, connectivity=4)
    for label, (x, y, w, h, size) in enumerate(holes):
        inside = x > 0 and y > 0 and x + w < width and y + h < height
        if label and inside and size <= HOLE * gap * area:
            joined[labels == label] = 1
    _, labels, parts, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    sizes = parts[:, cv2.CC_STAT_AREA]
    kept = sizes >= SPECK * sizes[1:].max()
    kept[0] = False  # what is not part of anything
    return np.asarray(kept[labels], np.uint8)
