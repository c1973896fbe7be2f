"""Masks and headers on the wire can be read back by who knows only the formats."""

import contextlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flawline.agent import wire


def decode_coco(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """COCO's own way back, written from the format's description."""
    runs: list[int] = []
    position = 0
    while position < len(data):
        value, shift, more = 0, 0, True
        while more:
            byte = data[position] - 48
            value |= (byte & 0x1F) << shift
            more = bool(byte & 0x20)
            position += 1
            shift += 5
            if not more and byte & 0x10:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    return flat.reshape(shape, order="F").astype(np.uint8) * 255


@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.sampled_from([0, 255])))
def test_masks_come_back_whole(mask: np.ndarray) -> None:
    assert (decode_coco(wire.encode_mask(mask, "coco_rle"), mask.shape) == mask).all()
    png = cv2.imdecode(np.frombuffer(wire.encode_mask(mask, "png"), np.uint8), cv2.IMREAD_UNCHANGED)
    assert (png == mask).all()


def test_topics_do_not_catch_longer_names() -> None:
    assert not wire.verdict_topic("line10", "top").startswith(wire.verdict_topic("line1", "top"))


@given(st.binary(max_size=200))
def test_garbage_is_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(wire.unpack(data), dict)


def test_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than"):
        wire.unpack(b"x" * 11, limit=10)
