"""How large the picture in a file is, from its head alone: before a decoder takes memory for all of it."""

import re
import struct

MOST_PIXELS = 400_000_000
"""The most that is read at all, and the most that worker.max_frame_mpx can be set to."""
_PNM = re.compile(rb"P[1-6](?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s")
_NO_LENGTH = {0x01, *range(0xD0, 0xD8)}  # JPEG's markers that nothing belongs to
_FRAME_HEADS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_TIFF_VALUES = {1: "B", 3: "H", 4: "I", 16: "Q"}


def picture_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in px of a PNG, JPEG, BMP, TIFF, WebP or PNM file; None for others and for a broken head."""
    try:
        return _size(data)
    except struct.error:  # ends within its head
        return None


def _size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith(b"\xff\xd8"):
        return _of_jpeg(data)
    elif data.startswith(b"BM"):
        core = struct.unpack_from("<I", data, 14)[0] == 12
        width, height = struct.unpack_from("<HH" if core else "<ii", data, 18)
    elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _of_tiff(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _of_webp(data)
    elif match := _PNM.match(data[:4096]):
        width, height = int(match[1]), int(match[2])
    else:
        return None
    return abs(height), abs(width)  # a BMP's height is negative where its rows begin at the top


def _of_jpeg(data: bytes) -> tuple[int, int] | None:
    """Of the frame's head, which stands before the first scan."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0:
        (marker,) = struct.unpack_from("B", data, at + 1)
        if marker in _FRAME_HEADS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        if marker in (0xD9, 0xDA):  # the end, or a scan
            return None
        if marker in (0x00, 0xFF):  # not a marker, or one that is filled up
            at += 1
        else:
            at += 2 if marker in _NO_LENGTH else 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    return None


def _of_tiff(data: bytes) -> tuple[int, int] | None:
    """Of the first picture; the largest of what is said twice."""
    order, big = "<" if data[0] == 0x49 else ">", 0x2B in data[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at += 8 if big else 2
    sides = {256: 0, 257: 0}  # width, height
    for _ in range(min(entries, 4096)):
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in sides and kind in _TIFF_VALUES:
            (value,) = struct.unpack_from(order + _TIFF_VALUES[kind], data, at + (12 if big else 8))
            sides[tag] = max(sides[tag], value)
        at += 20 if big else 12
    return (sides[257], sides[256]) if all(sides.values()) else None


def _of_webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        width, height = (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        return None
    return height, width
