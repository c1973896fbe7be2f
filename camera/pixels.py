"""From a camera's pixel format to the 8-bit RGB that is judged, written straight into the ring's slot."""

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.camera.frame import Pixels
from flawline.camera.pixel_format import PixelFormat, parse
from flawline.config.errors import ImageError

_BAYER = {
    "RG": cv2.COLOR_BayerRGGB2RGB,
    "GR": cv2.COLOR_BayerGRBG2RGB,
    "GB": cv2.COLOR_BayerGBRG2RGB,
    "BG": cv2.COLOR_BayerBGGR2RGB,
}


def _matrix(k_red: float, k_blue: float, y_scale: float, c_scale: float, y_offset: float) -> NDArray[np.float32]:
    """(3, 4) float32: (Y, Cb, Cr, 1) to (R, G, B), from the luma weights of ITU-R BT.601 or BT.709."""
    k_green = 1 - k_red - k_blue
    cr_red, cb_blue = 2 * (1 - k_red) * c_scale, 2 * (1 - k_blue) * c_scale
    cr_green, cb_green = -cr_red * k_red / k_green, -cb_blue * k_blue / k_green
    rows = np.array([[y_scale, 0, cr_red], [y_scale, cb_green, cr_green], [y_scale, cb_blue, 0]])
    offset = -rows @ np.array([y_offset, 128, 128])
    return np.column_stack([rows, offset]).astype(np.float32)


_YUV = {
    "full601": _matrix(0.299, 0.114, 1, 1, 0),
    "limited601": _matrix(0.299, 0.114, 255 / 219, 255 / 224, 16),
    "limited709": _matrix(0.2126, 0.0722, 255 / 219, 255 / 224, 16),
}


def to_rgb8(pixels: Pixels, pixel_format: str, out: NDArray[np.uint8]) -> None:
    """Convert `pixels` into `out`, (H, W, 3) uint8 RGB, of the same height and width.

    `pixels` lies in memory as `PixelFormat` says; packed formats are (N,) uint8. Formats deeper than 8 bit
    are scaled by their nominal depth (2^n - 1 becomes 255) and rounded to the nearest, never per image. Bayer
    mosaics are interpolated bilinearly at their full depth. Raises ImageError for a format that is not known
    or a shape that does not fit.
    """
    known = parse(pixel_format)
    height, width = out.shape[:2]
    _check_shape(pixels, known, height, width)
    try:
        if known.packed:
            pixels = unpack(pixels, known, height, width)
        match known.kind:
            case "mono":
                cv2.cvtColor(_eight_bit(pixels, known.bits), cv2.COLOR_GRAY2RGB, dst=out)
            case "bayer":
                _from_bayer(pixels, known, out)
            case "rgb" | "bgr":
                _from_colour(pixels, known, out)
            case "yuv422":
                _from_yuv422(pixels, known, out)
    except cv2.error as error:
        raise ImageError(f"a {width} x {height} picture in {pixel_format} cannot be converted: {error.err}") from error


def _check_shape(pixels: Pixels, known: PixelFormat, height: int, width: int) -> None:
    if known.packed:
        needed = known.bytes_of(height, width)
        if pixels.ndim != 1 or pixels.dtype != np.uint8 or pixels.size < needed:
            raise ImageError(f"{width} x {height} pixels in {known.name} need {needed} bytes, {pixels.nbytes} came")
        return
    shape = (height, width) if known.channels == 1 else (height, width, known.channels)
    if pixels.shape != shape:
        raise ImageError(f"a {pixels.shape} picture in {known.name} does not fit a {(height, width, 3)} slot")
    dtype = np.uint16 if known.bits > 8 else np.uint8
    if pixels.dtype != dtype:
        raise ImageError(f"{known.name} needs {np.dtype(dtype)} pixels, {pixels.dtype} came")


def unpack(pixels: Pixels, known: PixelFormat, height: int, width: int) -> Pixels:
    """(H, W) uint16 from the bytes of a packed format of 10 or 12 bit.

    `p` (PFNC): one stream of bits, lowest first. Legacy (GigE Vision's `Packed`): two pixels in three bytes, the
    high 8 bits of each outside, the low bits of both in the middle byte.
    """
    count = height * width
    if known.packing == "p" and known.bits == 10:
        data, groups = _whole_groups(pixels, count, 4, 5)
        values = np.empty((groups, 4), np.uint16)
        for i in range(4):  # pixel i begins 2 i bits after the beginning of byte i
            np.right_shift(_words(data, groups, 5, i), 2 * i, out=values[:, i])
        values &= 0x3FF
    else:
        data, groups = _whole_groups(pixels, count, 2, 3)
        values = np.empty((groups, 2), np.uint16)
        first, second = values[:, 0], values[:, 1]
        triple = data[: 3 * groups].reshape(groups, 3)
        if known.packing == "p":
            np.bitwise_and(_words(data, groups, 3, 0), 0xFFF, out=first)
            np.right_shift(_words(data, groups, 3, 1), 4, out=second)
        elif known.bits == 12:
            np.left_shift(triple[:, 0], 4, out=first, dtype=np.uint16)
            first |= triple[:, 1] & 0x0F
            np.right_shift(_words(data, groups, 3, 1), 4, out=second)
        else:
            np.left_shift(triple[:, 0], 2, out=first, dtype=np.uint16)
            first |= triple[:, 1] & 0x03
            np.left_shift(triple[:, 2], 2, out=second, dtype=np.uint16)
            second |= (triple[:, 1] >> 4) & 0x03
    return values.reshape(-1)[:count].reshape(height, width)


def _whole_groups(pixels: Pixels, count: int, pixels_each: int, bytes_each: int) -> tuple[NDArray[np.uint8], int]:
    """The bytes, filled up with zeros where the last group is not whole, and the number of groups."""
    groups = -(-count // pixels_each)
    missing = groups * bytes_each - pixels.size
    data = np.ascontiguousarray(pixels, dtype=np.uint8)
    return (np.pad(data, (0, missing)) if missing > 0 else data), groups


def _words(data: NDArray[np.uint8], groups: int, bytes_each: int, offset: int) -> NDArray[np.uint16]:
    """(groups,) uint16, a view: the two bytes at `offset` of each group, the lower one first."""
    return np.ndarray((groups,), "<u2", data, offset, (bytes_each,))


def _eight_bit(pixels: Pixels, bits: int) -> NDArray[np.uint8]:
    """Rounded to the nearest; there are no ties, because 255 / (2^n - 1) has an odd denominator."""
    if bits == 8:
        return np.asarray(pixels, dtype=np.uint8)
    eight = cv2.convertScaleAbs(pixels, alpha=255.0 / (2**bits - 1))
    return np.asarray(eight, dtype=np.uint8).reshape(pixels.shape)


def _from_bayer(pixels: Pixels, known: PixelFormat, out: NDArray[np.uint8]) -> None:
    if min(pixels.shape) < 2:
        raise ImageError(f"a {pixels.shape} picture is too small for {known.name}")
    if known.bits == 8:
        cv2.cvtColor(pixels, _BAYER[known.pattern], dst=out)
    else:
        deep = cv2.cvtColor(pixels, _BAYER[known.pattern])
        cv2.convertScaleAbs(deep, dst=out, alpha=255.0 / (2**known.bits - 1))


def _from_colour(pixels: Pixels, known: PixelFormat, out: NDArray[np.uint8]) -> None:
    eight = _eight_bit(pixels, known.bits)
    if known.kind == "bgr":
        cv2.cvtColor(eight, cv2.COLOR_BGRA2RGB if known.alpha else cv2.COLOR_BGR2RGB, dst=out)
    elif known.alpha:
        cv2.cvtColor(eight, cv2.COLOR_RGBA2RGB, dst=out)
    else:
        np.copyto(out, eight)


def _from_yuv422(pixels: Pixels, known: PixelFormat, out: NDArray[np.uint8]) -> None:
    """Each pair of pixels shares one Cb and one Cr.

    The matrix is applied in fixed point, twelve times faster than in floats: over every Y, Cb and Cr the result
    is within 0.66 of a level of the exact value, so one value in 25 is a level beside the nearest one.
    """
    if out.shape[1] % 2:
        raise ImageError(f"{known.name} needs an even width, {out.shape[1]} came")
    luma, chroma = (1, 0) if known.chroma_first else (0, 1)
    ycc = np.empty(out.shape, np.uint8)
    ycc[:, :, 0] = pixels[:, :, luma]
    for channel in (1, 2):
        shared = pixels[:, channel - 1 :: 2, chroma]
        ycc[:, 0::2, channel] = shared
        ycc[:, 1::2, channel] = shared
    cv2.transform(ycc, _YUV[known.colours], dst=out)
