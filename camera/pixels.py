"""From a camera's pixel format to the 8-bit RGB that is judged, written straight into the ring's slot."""

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.camera.frame import Pixels
from flawline.config.errors import ImageError

_DEPTH = {"Mono10": 10, "Mono12": 12, "Mono14": 14, "Mono16": 16, "RGB16": 16, "BGR16": 16}


def to_rgb8(pixels: Pixels, pixel_format: str, out: NDArray[np.uint8]) -> None:
    """Convert `pixels` into `out`, (H, W, 3) uint8 RGB, of the same height and width.

    Formats deeper than 8 bit are scaled by their nominal depth (2^n - 1 becomes 255), never per image.
    Raises ImageError for a format that is not known or a shape that does not fit.
    """
    if pixels.shape[:2] != out.shape[:2]:
        raise ImageError(f"a {pixels.shape[:2]} picture does not fit a {out.shape[:2]} slot")
    if pixels.dtype == np.uint16:
        depth = _DEPTH.get(pixel_format)
        if depth is None:
            raise ImageError(f"pixel format {pixel_format!r} is not known for 16-bit data")
        eight = cv2.convertScaleAbs(pixels, alpha=255.0 / (2**depth - 1))
        pixels = np.asarray(eight, dtype=np.uint8).reshape(pixels.shape)
    if pixels.ndim == 2:
        if not pixel_format.startswith("Mono"):
            raise ImageError(f"pixel format {pixel_format!r} is not known for one-channel data")
        cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB, dst=out)
    elif pixel_format.startswith("RGB"):
        np.copyto(out, pixels)
    elif pixel_format.startswith("BGR"):
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=out)
    else:
        raise ImageError(f"pixel format {pixel_format!r} is not known for three-channel data")
