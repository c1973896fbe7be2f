"""A picture with what the inspection found drawn into it: the map as heat, defects outlined, boxed and scored."""

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import FlawlineError
from flawline.models.results import InspectionResult

Picture = NDArray[np.uint8]  # (H, W, 3) RGB

RED, GREEN = (230, 40, 40), (40, 170, 70)
HEAT_SHARE = 0.6  # of the heat's colour where the map is 1


def draw(picture: Picture, result: InspectionResult) -> Picture:
    """The overlay, of the picture's size.

    The map lies over the picture as heat, the stronger the higher it is, on one scale for all pictures. Every
    defect is outlined and boxed with its score; the frame's edge is red for a fail and green for a pass.
    """
    heat = cv2.applyColorMap((np.clip(result.anomaly_map, 0.0, 1.0) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    share = HEAT_SHARE * np.clip(result.anomaly_map, 0.0, 1.0)[:, :, None]
    drawn = np.ascontiguousarray((picture * (1.0 - share) + heat[:, :, ::-1] * share).astype(np.uint8))
    line = line_width(picture)
    contours, _ = cv2.findContours(result.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, contours, -1, RED, line)
    for defect in result.defects:
        x, y, w, h = defect.bbox
        cv2.rectangle(drawn, (x - line, y - line), (x + w + line - 1, y + h + line - 1), RED, line)
        _label(drawn, f"{defect.score:.3f}", x, (y - 2 * line, y + h + 2 * line), line)
    _edge(drawn, GREEN if result.passed else RED, line)
    return drawn


def line_width(picture: Picture) -> int:
    """Thin on small pictures, still visible on large ones."""
    return max(1, int(max(picture.shape)) // 500)


def _label(drawn: Picture, text: str, x: int, above_below: tuple[int, int], line: int) -> None:
    """White on red, above a box where there is room, else below it."""
    scale, thickness = 0.4 * (1 + line / 2), max(1, line // 2)
    (width, height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    x = max(0, min(x, drawn.shape[1] - width))
    above, below = above_below
    y = above if above >= height + baseline else min(below + height + baseline, drawn.shape[0])
    cv2.rectangle(drawn, (x, y - height - baseline), (x + width, y), RED, cv2.FILLED)
    cv2.putText(
        drawn, text, (x, y - baseline // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thickness, cv2.LINE_AA
    )


def _edge(drawn: Picture, colour: tuple[int, int, int], line: int) -> None:
    height, width = drawn.shape[:2]
    cv2.rectangle(drawn, (0, 0), (width - 1, height - 1), colour, line)


def mask_picture(result: InspectionResult) -> NDArray[np.uint8]:
    """(H, W) with 255 where the mask is."""
    return result.mask.astype(np.uint8) * np.uint8(255)


def encode(picture: NDArray[np.uint8], suffix: str = ".png") -> bytes:
    """(H, W, 3) RGB or (H, W) grey -> the bytes of a picture file. Raises FlawlineError."""
    done, data = cv2.imencode(suffix, picture if picture.ndim == 2 else picture[:, :, ::-1])
    if not done:
        raise FlawlineError(f"a picture of shape {picture.shape} cannot be written as {suffix}")
    return data.tobytes()


def reduced(picture: Picture, edge: int) -> Picture:
    """The picture with its long side at most `edge` pixels."""
    height, width = picture.shape[:2]
    scale = edge / max(height, width)
    if scale >= 1.0:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
