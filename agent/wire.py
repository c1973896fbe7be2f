"""The wire: topics, schemas, and how headers become bytes. What every subscriber relies on."""

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
    except ValueError:
        raise
    except Exception as error:  # msgpack has a zoo of them; all mean that the bytes are wrong
        raise ValueError(f"not msgpack: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("not a map")
    return header


def encode_mask(mask: NDArray[np.uint8], encoding: str) -> bytes:
    """(H, W) uint8, 0 or 255, as a PNG file or as COCO's compressed run lengths."""
    if encoding == "coco_rle":
        return coco_rle(mask)
    # Level 1: masks are nearly empty, higher levels save few bytes and cost milliseconds.
    ok, data = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not ok:
        raise ValueError(f"a mask of shape {mask.shape} cannot be written as PNG")
    return bytes(data)


def coco_rle(mask: NDArray[np.uint8]) -> bytes:
    """COCO's compressed run-length encoding: column by column, runs of 0 and 1 in turn, starting with 0.

    Each run length, from the fourth on less the one two before it, is written in groups of five bits,
    lowest first, bit six saying that another group follows, each group offset by 48.
    """
    flat = (mask != 0).ravel(order="F").view(np.uint8)
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
