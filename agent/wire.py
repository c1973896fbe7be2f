"""The wire: topics, schemas, and how headers become bytes. What every subscriber relies on."""

import struct
import zlib
from typing import Any

import cv2
import msgpack
import numpy as np
from numpy.typing import NDArray

VERDICT_SCHEMA = "flawline.verdict/1"
MASK_SCHEMA = "flawline.mask/1"
STATUS_SCHEMA = "flawline.status/1"

Header = dict[str, Any]


def verdict_topic(station: str, camera: str) -> bytes:
    """Where a camera's verdicts go. Topics end with a slash, so that no prefix catches a longer name."""
    return f"verdict/{station}/{camera}/".encode()


def mask_topic(station: str, camera: str) -> bytes:
    """Where a camera's masks go."""
    return f"mask/{station}/{camera}/".encode()


def late_topic(station: str, camera: str) -> bytes:
    """Where results go that came after their deadline."""
    return f"late/{station}/{camera}/".encode()


def status_topic(station: str) -> bytes:
    """Where the station's status goes, once a second."""
    return f"status/{station}/".encode()


def pack(header: Header) -> bytes:
    """A header as msgpack: string keys, integers stay integers."""
    data: bytes = msgpack.packb(header, use_bin_type=True)
    return data


def unpack(data: bytes, limit: int = 1 << 20) -> Header:
    """A header from msgpack. Raises ValueError where it is not a map with string keys within `limit` bytes."""
    if len(data) > limit:
        raise ValueError(f"a message of {len(data)} bytes is larger than {limit}")
    try:
        header = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack has a zoo of them, some without a word; all mean that the bytes are wrong
        raise ValueError(f"not msgpack: {str(error) or type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ValueError("not a map")
    return header


def encode_mask(mask: NDArray[np.uint8], encoding: str) -> bytes:
    """(H, W) uint8, 0 or 255, as a PNG file or as COCO's compressed run lengths."""
    if encoding == "coco_rle":
        return coco_rle(mask)
    return png(mask)


def png(mask: NDArray[np.uint8]) -> bytes:
    """(H, W) uint8 as an 8-bit grey PNG file, every row unfiltered.

    Masks are nearly empty: filters gain nothing on them, and libpng takes four times as long to try them.
    """
    height, width = mask.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with the number of its filter, 0
    rows[:, 1:] = mask
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.data, 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def coco_rle(mask: NDArray[np.uint8]) -> bytes:
    """COCO's compressed run-length encoding: column by column, runs of 0 and 1 in turn, starting with 0.

    Each run length, from the fourth on less the one two before it, is written in groups of five bits,
    lowest first, bit six saying that another group follows, each group offset by 48.
    """
    flat = (cv2.transpose(mask) != 0).ravel().view(np.uint8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate(([0], changes, [flat.size]))
    runs = np.diff(edges).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    out = bytearray()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != (-1 if group & 0x10 else 0)
            out.append((group | 0x20 if more else group) + 48)
    return bytes(out)
