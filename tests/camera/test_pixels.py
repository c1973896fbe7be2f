"""Pixel formats against slow references written from the definitions of the formats."""

import numpy as np
import pytest
from numpy.typing import NDArray

from flawline.camera.frame import Frame, Pixels
from flawline.camera.pixel_format import parse
from flawline.camera.pixels import to_rgb8
from flawline.config.errors import ImageError

RNG = np.random.default_rng(5)
ALL_WIDTHS = [(4, 8), (7, 9), (3, 5), (16, 20)]


def convert(pixels: Pixels, name: str, height: int, width: int) -> NDArray[np.uint8]:
    """Through a slot inside a larger memory, to see that it is written in place and nothing beside it."""
    memory = np.full(height * width * 3 + 64, 0xA5, np.uint8)
    slot = memory[32:-32].reshape(height, width, 3)
    to_rgb8(pixels, name, slot)
    assert (memory[:32] == 0xA5).all()
    assert (memory[-32:] == 0xA5).all()
    return slot


def scaled(values: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Exact integer arithmetic: round(v * 255 / (2^bits - 1))."""
    top = 2**bits - 1
    return ((values.astype(np.int64) * 510 + top) // (2 * top)).astype(np.uint8)


def bits_to_bytes(values: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """PFNC `p`: all bits in one stream, the lowest of each value first."""
    stream = "".join(format(int(v), f"0{bits}b")[::-1] for v in values.reshape(-1))
    stream += "0" * (-len(stream) % 8)
    return np.array([int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)], np.uint8)


def legacy_bytes(values: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """GigE Vision `Packed`: high byte, low bits of both, high byte."""
    flat = [int(v) for v in values.reshape(-1)]
    flat += [0] * (len(flat) % 2)
    low = bits - 8
    out = []
    for a, b in zip(flat[::2], flat[1::2], strict=True):
        out += [a >> low, (a & (2**low - 1)) | ((b & (2**low - 1)) << 4), b >> low]
    return np.array(out, np.uint8)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_deep_grey_is_rounded_to_the_nearest_for_every_value(bits: int) -> None:
    values = np.arange(2**bits, dtype=np.uint16).reshape(-1, 64)
    out = convert(values, f"Mono{bits}", *values.shape)
    assert (out == scaled(values, bits)[:, :, None]).all()


def test_mono8_is_kept_as_it_is() -> None:
    values = RNG.integers(0, 256, (6, 7), dtype=np.uint8)
    assert (convert(values, "Mono8", 6, 7) == values[:, :, None]).all()


@pytest.mark.parametrize(("height", "width"), ALL_WIDTHS)
@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("suffix", ["p", "Packed"])
def test_packed_grey_equals_the_bits_read_one_by_one(bits: int, suffix: str, height: int, width: int) -> None:
    values = RNG.integers(0, 2**bits, (height, width), dtype=np.uint16)
    data = bits_to_bytes(values, bits) if suffix == "p" else legacy_bytes(values, bits)
    assert data.size == parse(f"Mono{bits}{suffix}").bytes_of(height, width)
    out = convert(data, f"Mono{bits}{suffix}", height, width)
    assert (out == scaled(values, bits)[:, :, None]).all()


def slow_bayer(mosaic: NDArray[np.integer], pattern: str) -> NDArray[np.int64]:
    """Bilinear interpolation of the pixels that are not at the border, rounded half up: (H - 2, W - 2, 3)."""
    second = {"RG": "GB", "GR": "BG", "GB": "RG", "BG": "GR"}[pattern]
    colour = [["RGB".index(c) for c in pattern], ["RGB".index(c) for c in second]]
    height, width = mosaic.shape
    out = np.zeros((height - 2, width - 2, 3), np.int64)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            for channel in range(3):
                if colour[y % 2][x % 2] == channel:
                    out[y - 1, x - 1, channel] = mosaic[y, x]
                    continue
                near = [
                    int(mosaic[y + dy, x + dx])
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if colour[(y + dy) % 2][(x + dx) % 2] == channel
                ]
                out[y - 1, x - 1, channel] = (2 * sum(near) + len(near)) // (2 * len(near))
    return out


@pytest.mark.parametrize("pattern", ["RG", "GR", "GB", "BG"])
def test_bayer_8_bit_is_interpolated_bilinearly(pattern: str) -> None:
    mosaic = RNG.integers(0, 256, (12, 14), dtype=np.uint8)
    out = convert(mosaic, f"Bayer{pattern}8", 12, 14)
    difference = out[1:-1, 1:-1].astype(int) - slow_bayer(mosaic, pattern)
    assert np.abs(difference).max() <= 1
    assert np.abs(difference).mean() < 0.3


@pytest.mark.parametrize("pattern", ["RG", "GR", "GB", "BG"])
@pytest.mark.parametrize(("bits", "suffix"), [(10, ""), (12, ""), (16, ""), (10, "p"), (12, "p"), (12, "Packed")])
def test_bayer_deep_is_interpolated_before_it_is_rounded(pattern: str, bits: int, suffix: str) -> None:
    mosaic = RNG.integers(0, 2**bits, (10, 12), dtype=np.uint16)
    data: Pixels = mosaic
    if suffix:
        data = bits_to_bytes(mosaic, bits) if suffix == "p" else legacy_bytes(mosaic, bits)
    out = convert(data, f"Bayer{pattern}{bits}{suffix}", 10, 12)
    exact = slow_bayer(mosaic, pattern) * 255 / (2**bits - 1)
    assert np.abs(out[1:-1, 1:-1] - exact).max() <= 0.5 + 1.01 * 255 / 2**bits


@pytest.mark.parametrize("pattern", ["RG", "GR", "GB", "BG"])
def test_a_plain_red_scene_comes_out_red(pattern: str) -> None:
    second = {"RG": "GB", "GR": "BG", "GB": "RG", "BG": "GR"}[pattern]
    cell = np.array([[200 if c == "R" else 10 for c in line] for line in (pattern, second)], np.uint8)
    out = convert(np.tile(cell, (8, 8)), f"Bayer{pattern}8", 16, 16)
    assert (out == [200, 10, 10]).all()


def test_colour_orders() -> None:
    rgb = RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    opaque = np.full((5, 6, 1), 255, np.uint8)
    for name, pixels in {
        "RGB8": rgb,
        "RGB8Packed": rgb,
        "BGR8": bgr,
        "BGR8Packed": bgr,
        "RGBa8": np.concatenate([rgb, opaque], axis=2),
        "BGRA8Packed": np.concatenate([bgr, opaque], axis=2),
        "RGB16": rgb.astype(np.uint16) * 257,
        "BGR16": bgr.astype(np.uint16) * 257,
    }.items():
        assert (convert(pixels, name, 5, 6) == rgb).all(), name


@pytest.mark.parametrize(
    ("name", "order", "matrix"),
    [
        ("YUV422_8", "yuyv", "full"),
        ("YUV422Packed", "uyvy", "full"),
        ("YCbCr422_8_CbYCrY", "uyvy", "full"),
        ("YCbCr601_422_8", "yuyv", "601"),
        ("YCbCr709_422_8_CbYCrY", "uyvy", "709"),
    ],
)
def test_yuv422_against_the_standards_equations(name: str, order: str, matrix: str) -> None:
    luma = RNG.integers(16, 236, (4, 6)).astype(float)
    blue, red = RNG.integers(16, 241, (2, 4, 3)).astype(float)
    pixels = np.empty((4, 6, 2), np.uint8)
    y, c = (0, 1) if order == "yuyv" else (1, 0)
    pixels[:, :, y] = luma
    pixels[:, 0::2, c] = blue
    pixels[:, 1::2, c] = red
    cb, cr = np.repeat(blue, 2, axis=1) - 128, np.repeat(red, 2, axis=1) - 128
    if matrix == "full":
        planes = [luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb]
    elif matrix == "601":
        y1 = 1.164384 * (luma - 16)
        planes = [y1 + 1.596027 * cr, y1 - 0.391762 * cb - 0.812968 * cr, y1 + 2.017232 * cb]
    else:
        y1 = 1.164384 * (luma - 16)
        planes = [y1 + 1.792741 * cr, y1 - 0.213249 * cb - 0.532909 * cr, y1 + 2.112402 * cb]
    expected = np.clip(np.stack(planes, axis=2), 0, 255)
    # OpenCV's matrix has fixed-point coefficients: over every Y, Cb, Cr it is off by 0.66 of a level at most, not 0.5.
    assert np.abs(convert(pixels, name, 4, 6) - expected).max() <= 0.67


def test_loss_of_bits_is_said_in_words() -> None:
    assert parse("Mono8").note is None
    assert "lowest 4 of 12 bits" in (parse("Mono12p").note or "")
    assert "lowest 2 of 10 bits" in (parse("BayerGR10").note or "")


@pytest.mark.parametrize(
    ("pixels", "name", "words"),
    [
        (np.zeros((4, 6), np.uint8), "Mono99", "not known"),
        (np.zeros((4, 6), np.uint8), "Mono12", "needs uint16"),
        (np.zeros((4, 6), np.uint16), "Mono8", "needs uint8"),
        (np.zeros((4, 5), np.uint8), "Mono8", "does not fit"),
        (np.zeros(10, np.uint8), "Mono12p", "need 36 bytes, 10 came"),
        (np.zeros((4, 6, 3), np.uint8), "Mono8", "does not fit"),
        (np.zeros((4, 6, 3), np.uint8), "Coord3D_ABC32f", "not known"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_words(pixels: Pixels, name: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        to_rgb8(pixels, name, np.zeros((4, 6, 3), np.uint8))


def test_a_packed_frame_knows_its_size() -> None:
    assert Frame(1, 0, np.zeros(36, np.uint8), "Mono12p", extent=(4, 6)).size == (4, 6)
    assert Frame(1, 0, np.zeros((4, 6, 3), np.uint8)).size == (4, 6)
    assert Frame(1, 0, None, fault="lost").size == (0, 0)
