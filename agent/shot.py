"""What the preview keeps of one judged frame: copies at preview size, and what is drawn over them."""

import json
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.agent.wire import Header

MAX_OUTLINES = 64
"""Outlines of one mask that are sent, largest first."""
MAX_BOXES = 64
"""Defect boxes that are sent, as the verdict orders them: largest first."""
_MAX_CORNERS = 96  # of one outline
_COLOURS = {"pass": (0, 158, 115), "fail": (213, 94, 0), "error": (204, 121, 167)}  # RGB, apart for colour-blind eyes


@dataclass(frozen=True, slots=True)
class Shot:
    """One frame as it is shown."""

    header: Header
    frame_size: tuple[int, int]  # W, H of the captured frame, px
    picture: NDArray[np.uint8]  # (h, w, 3) RGB, even sides
    mask: NDArray[np.uint8] | None  # (h, w), above 0 where a defect is
    anomaly_map: NDArray[np.uint8] | None  # (h, w), 255 for 1.0
    points: list[list[float]]  # x, y, label in pixels of the captured frame


def preview_size(width: int, height: int, long_side: int) -> tuple[int, int]:
    """(w, h) with `long_side` at most and never larger than the frame; even, as chroma subsampling needs."""
    scale = min(1.0, long_side / max(width, height))
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)


def take(
    header: Header,
    picture: NDArray[np.uint8],
    mask: NDArray[np.uint8] | None,
    anomaly_map: NDArray[np.uint8] | None,
    points: list[list[float]],
    long_side: int,
) -> Shot:
    """Copy what is shown out of the ring, scaled down. For a thread: some milliseconds for a large frame.

    Bilinear for the picture: its cost follows the small copy, not the large frame.
    """
    height, width = picture.shape[:2]
    size = preview_size(width, height, long_side)

    def scaled(plane: NDArray[np.uint8], how: int) -> NDArray[np.uint8]:
        if (width, height) == size:
            return plane.copy()
        return np.asarray(cv2.resize(plane, size, interpolation=how), np.uint8)

    if mask is not None and header["defects"]:
        # Grown by a sample's distance, so that a defect of a few pixels does not fall between two samples.
        reach = -(-width // size[0])
        mask = scaled(cv2.dilate(mask, np.ones((reach, reach), np.uint8)) if reach > 1 else mask, cv2.INTER_NEAREST)
    else:
        mask = None
    return Shot(
        header,
        (width, height),
        scaled(picture, cv2.INTER_LINEAR),
        mask,
        scaled(anomaly_map, cv2.INTER_LINEAR) if anomaly_map is not None else None,
        points,
    )


def outlines(shot: Shot) -> list[NDArray[np.int32]]:
    """Closed outlines of the mask, (n, 2) x and y at preview size, at most MAX_OUTLINES, largest first."""
    if shot.mask is None:
        return []
    found, _ = cv2.findContours((shot.mask > 0).view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    largest = sorted(found, key=cv2.contourArea, reverse=True)[:MAX_OUTLINES]
    simple = []
    for contour in largest:
        tolerance = 0.75
        while len(contour) > _MAX_CORNERS:
            contour = cv2.approxPolyDP(contour, tolerance, True)
            tolerance *= 1.5
        simple.append(contour.reshape(-1, 2))
    return simple


def overlay(shot: Shot, timestamp: int) -> str:
    """JSON for the page: what to draw over the frame whose RTP time stamp is `timestamp` plus the stream's offset.

    Outlines are corners of preview pixels, boxes and points pixels of the captured frame, sizes tell both.
    """
    header = shot.header
    height, width = shot.picture.shape[:2]
    return json.dumps(
        {
            "ts": timestamp,
            "size": [width, height],
            "frame": list(shot.frame_size),
            **{key: header[key] for key in ("seq", "frame_id", "result", "reason", "score", "threshold", "degraded")},
            "t_grab": header["t_grab"],
            "t_publish": header["t_publish"],
            "outlines": [outline.ravel().tolist() for outline in outlines(shot)],
            "boxes": [[*defect["bbox"], round(defect["score"], 3)] for defect in header["defects"][:MAX_BOXES]],
            "points": [[round(x, 1), round(y, 1), int(label)] for x, y, label in shot.points[:64]],
        },
        separators=(",", ":"),
    )


def marked(shot: Shot) -> NDArray[np.uint8]:
    """(h, w, 3) RGB: the picture with outlines and boxes drawn into it."""
    canvas = shot.picture.copy()
    height, width = canvas.shape[:2]
    thick = max(1, width // 480)
    air = 3 * thick  # between a defect and its box, so that both are seen
    found = outlines(shot)
    cv2.polylines(canvas, found, True, (0, 0, 0), thick + 2)
    cv2.polylines(canvas, found, True, (255, 224, 64), thick)
    across, down = width / shot.frame_size[0], height / shot.frame_size[1]
    for defect in shot.header["defects"][:MAX_BOXES]:
        x, y, w, h = defect["bbox"]
        corner = int(x * across) - air, int(y * down) - air
        opposite = int((x + w) * across) + air, int((y + h) * down) + air
        cv2.rectangle(canvas, corner, opposite, _COLOURS[shot.header["result"]], thick)
    return canvas


def burnt(shot: Shot) -> NDArray[np.uint8]:
    """(h, w, 3) RGB: the marked picture with the result written over it, for players that draw nothing."""
    canvas = marked(shot)
    height, width = canvas.shape[:2]
    result = shot.header["result"]
    text = result.upper() + (f" {shot.header['reason']}" if shot.header["reason"] else "")
    if shot.header["score"] is not None:
        text += f"  {shot.header['score']:.3f}"
    text += f"  no. {shot.header['seq']}"
    bar = max(16, height // 14)
    cv2.rectangle(canvas, (0, 0), (width, bar), _COLOURS[result], -1)
    scale = bar / 34
    cv2.putText(
        canvas, text, (6, int(bar * 0.76)), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), max(1, width // 480)
    )
    return canvas


def waiting(camera: str) -> NDArray[np.uint8]:
    """(360, 640, 3) RGB: what a camera shows before its first picture."""
    canvas = np.full((360, 640, 3), 40, np.uint8)
    cv2.putText(canvas, f"{camera}: no part yet"[:40], (24, 190), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (190, 190, 190), 2)
    return canvas


def thumbnail(shot: Shot, width: int = 240) -> NDArray[np.uint8]:
    """(h, width, 3) RGB: the picture in small, marked at that size, so that the marks do not shrink with it."""
    size = (width, max(1, shot.picture.shape[0] * width // shot.picture.shape[1]))
    picture: NDArray[np.uint8] = cv2.resize(shot.picture, size, interpolation=cv2.INTER_AREA)
    mask = (
        None if shot.mask is None else np.asarray(cv2.resize(shot.mask, size, interpolation=cv2.INTER_AREA), np.uint8)
    )
    return marked(replace(shot, picture=picture, mask=mask))


def heat(anomaly_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w, 3) RGB of a map on the fixed scale 0 to 1: frames compare, and a good part stays dark."""
    coloured = cv2.applyColorMap(anomaly_map, cv2.COLORMAP_INFERNO)
    return np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), np.uint8)


def jpeg(picture: NDArray[np.uint8], quality: int = 80) -> bytes:
    """RGB or grey picture as a JPEG file."""
    return _file(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])


def png(picture: NDArray[np.uint8]) -> bytes:
    """RGB or grey picture as a PNG file."""
    return _file(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])


def _file(suffix: str, picture: NDArray[np.uint8], options: list[int]) -> bytes:
    pixels: Any = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if picture.ndim == 3 else picture
    ok, data = cv2.imencode(suffix, pixels, options)
    if not ok:
        raise ValueError(f"a picture of shape {picture.shape} cannot be written as {suffix}")
    return bytes(data)
