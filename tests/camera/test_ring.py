"""The frame ring: planes do not overlap, slots are counted, nothing has a name that could be left behind."""

import numpy as np
import pytest

from flawline.camera.ring import FrameRing, SlotViews
from flawline.config.errors import RingError


def test_planes_are_shared_and_apart() -> None:
    ring = FrameRing(slots=2, max_pixels=64)
    other = SlotViews(ring.fd, 2, 64)
    ring.picture(1, 8, 8)[:] = 1
    ring.mask(1, 8, 8)[:] = 2
    ring.anomaly_map(1, 8, 8)[:] = 3
    ring.mask(1, 8, 8, refined=True)[:] = 4
    assert (other.picture(1, 8, 8) == 1).all()
    assert (other.mask(1, 8, 8) == 2).all()
    assert (other.anomaly_map(1, 8, 8) == 3).all()
    assert (other.mask(1, 8, 8, refined=True) == 4).all()
    assert not np.any(other.picture(0, 8, 8))
    ring.close()


def test_slots_are_bounded_and_given_back_once() -> None:
    ring = FrameRing(slots=2, max_pixels=16)
    first, second = ring.acquire(), ring.acquire()
    assert ring.acquire() is None
    assert first is not None
    ring.release(first)
    with pytest.raises(RingError, match="twice"):
        ring.release(first)
    assert ring.in_use == 1
    assert second is not None
    with pytest.raises(RingError, match="max_frame_mpx"):
        ring.picture(second, 5, 5)
    ring.close()
