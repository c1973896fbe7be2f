"""A driver's buffer of bytes seen as the picture it holds, without a copy."""

import numpy as np
from numpy.typing import NDArray

from flawline.camera.frame import Pixels
from flawline.camera.pixel_format import parse
from flawline.config.errors import ImageError


def as_picture(data: NDArray[np.uint8], pixel_format: str, height: int, width: int, line_padding: int = 0) -> Pixels:
    """A view of `data`, (N,) uint8, in the shape that `PixelFormat` gives: (H, W), (H, W, C) or, packed, (N,).

    `line_padding` bytes follow every line; behind the picture there may be more, padding or the camera's chunk data.
    Raises ImageError where the format is not known or bytes are missing, and where a packed format comes in exactly as
    many bytes as its pixels have when they are unpacked: read as packed ones, they would be another picture.
    """
    known = parse(pixel_format)
    needed = known.bytes_of(height, width) + line_padding * (height - 1)
    if data.size < needed:
        raise ImageError(f"{width} x {height} pixels in {pixel_format} need {needed} bytes, {data.size} came")
    if known.packed:
        if line_padding:
            raise ImageError(f"{pixel_format} with {line_padding} bytes of padding after each line is not supported")
        if data.size == 2 * height * width:
            raise ImageError(
                f"{width} x {height} pixels came in {data.size} bytes: unpacked, and not in {pixel_format}"
            )
        return data
    line = known.bytes_of(1, width) + line_padding
    dtype = np.dtype(np.uint16 if known.bits > 8 else np.uint8)
    shape: tuple[int, ...] = (height, width)
    strides: tuple[int, ...] = (line, dtype.itemsize * known.channels)
    if known.channels > 1:
        shape, strides = (*shape, known.channels), (*strides, dtype.itemsize)
    return np.ndarray(shape, dtype, buffer=data, strides=strides)
