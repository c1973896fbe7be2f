"""One picture that shows where a class is judged best and worst: picture, truth, and overlay side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import FlawlineError

CELL = 192  # edge of one picture on the sheet, px
LINE = 22  # height of a caption, px
RED, GREEN = (230, 40, 40), (40, 200, 60)


@dataclass(frozen=True)
class Cell:
    """What one row of the sheet shows."""

    caption: str
    picture: NDArray[np.uint8]  # (H, W, 3) RGB
    mask: NDArray[np.bool_] | None  # of any size
    anomaly_map: NDArray[np.float32]  # of any size


def overlay(picture: NDArray[np.uint8], anomaly_map: NDArray[np.float32], threshold: float) -> NDArray[np.uint8]:
    """The picture with what lies at or above `threshold` outlined in red, over the map as a fixed colour scale."""
    height, width = picture.shape[:2]
    enlarged = cv2.resize(anomaly_map, (width, height), interpolation=cv2.INTER_LINEAR)
    heat = cv2.applyColorMap((np.clip(enlarged, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    mixed = np.ascontiguousarray((picture * 0.6 + heat * 0.4).astype(np.uint8))
    return _outlined(mixed, enlarged >= threshold, RED)


def _outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = picture.copy()
    cv2.drawContours(drawn, contours, -1, colour, max(1, max(picture.shape) // 250))
    return drawn


def write_sheet(path: Path, best: Sequence[Cell], worst: Sequence[Cell], threshold: float) -> None:
    """Best on the left, worst on the right; per picture three columns: itself, the truth, the overlay."""
    rows = max(len(best), len(worst), 1)
    sheet = np.full((LINE + rows * (CELL + LINE), 6 * CELL + LINE, 3), 255, np.uint8)
    for column, (title, cells) in enumerate((("best", best), ("worst", worst))):
        left = column * (3 * CELL + LINE)
        _write(sheet, f"{title}   (picture, truth, map with outline at {threshold:.3f})", left, LINE - 7)
        for number, cell in enumerate(cells):
            top = LINE + number * (CELL + LINE)
            truth = np.full_like(cell.picture, 220)
            if cell.mask is not None:
                size = (cell.picture.shape[1], cell.picture.shape[0])
                mask = cv2.resize(cell.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
                truth = _outlined(cell.picture, mask, GREEN)
            for place, shown in enumerate((cell.picture, truth, overlay(cell.picture, cell.anomaly_map, threshold))):
                sheet[top : top + CELL, left + place * CELL : left + (place + 1) * CELL] = _fitted(shown)
            _write(sheet, cell.caption, left, top + CELL + LINE - 7)
    encoded, data = cv2.imencode(".png", sheet[:, :, ::-1])
    if not encoded:
        raise FlawlineError(f"{path}: the contact sheet cannot be encoded")
    path.write_bytes(data.tobytes())


def _fitted(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    scale = CELL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    cell = np.full((CELL, CELL, 3), 245, np.uint8)
    top, left = (CELL - size[1]) // 2, (CELL - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return cell


def _write(sheet: NDArray[np.uint8], text: str, x: int, y: int) -> None:
    drawn = text[:90].encode("ascii", "replace").decode()  # its font has no more, and it does not look
    cv2.putText(sheet, drawn, (x + 2, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (20, 20, 20), 1, cv2.LINE_AA)
