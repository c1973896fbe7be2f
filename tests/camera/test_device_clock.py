"""A camera's clock against the host's through a line that delays, and gaps in its numbers."""

import numpy as np

from flawline.camera.device_clock import BlockNumbers, DeviceClock

MS = 1_000_000
HOST = 86_400_000_000_000


def test_transfer_jitter_is_taken_out_and_drift_followed() -> None:
    rng = np.random.default_rng(3)
    clock = DeviceClock()
    errors = []
    for number in range(6000):  # 10 minutes at 10 Hz; the camera's clock is 50 ppm fast and began at 7 s
        exposed = HOST + number * 100 * MS
        device = 7_000 * MS + int(number * 100 * MS * (1 + 50e-6))
        arrived = exposed + 3 * MS + int(rng.exponential(4 * MS))
        mapped = clock.to_monotonic(device, arrived)
        assert mapped <= arrived
        if number > 50:
            errors.append((mapped - exposed) / MS)
    assert 2.5 < np.median(errors) < 4.5  # the shortest transfer stays in: it cannot be seen from here
    assert np.std(errors) < 0.6  # the jitter's own is 4


def test_a_camera_that_was_restarted_has_a_new_clock() -> None:
    clock = DeviceClock()
    assert clock.to_monotonic(900 * MS, HOST) == HOST
    assert clock.to_monotonic(1000 * MS, HOST + 130 * MS) == HOST + 100 * MS
    assert clock.to_monotonic(5 * MS, HOST + 9000 * MS) == HOST + 9000 * MS


def test_after_a_long_pause_the_old_offset_is_forgotten() -> None:
    clock = DeviceClock()
    clock.to_monotonic(0, HOST)
    hour = 3_600_000 * MS
    slow = HOST + hour + 180 * MS  # 50 ppm in an hour
    assert clock.to_monotonic(hour, slow) == slow


def test_gaps_are_listed_across_16_bits_and_new_counts_are_no_losses() -> None:
    numbers = BlockNumbers()
    assert numbers.gap(10) == []
    assert numbers.gap(11) == []
    assert numbers.gap(11) == []
    assert numbers.gap(14) == [12, 13]
    assert numbers.gap(65_533) == []  # far away: another count
    assert numbers.gap(2) == [65_534, 65_535, 1]
    assert numbers.gap(1 << 40) == []
    assert numbers.gap((1 << 40) + 2) == [(1 << 40) + 1]
    assert numbers.gap(1) == []
    assert (numbers.missed, numbers.renumbered) == (6, 3)
    numbers.restart()
    assert numbers.gap(500) == []
    assert (numbers.missed, numbers.renumbered) == (6, 3)


def test_a_count_of_16_bits_may_go_on_at_0() -> None:
    numbers = BlockNumbers()
    assert numbers.gap(65_535) == []
    assert numbers.gap(0) == []
    assert numbers.missed == 0
    assert numbers.gap(65_534) == []  # far away: another count
    assert numbers.gap(1) == [65_535, 0]
    assert numbers.missed == 2


def test_a_frame_without_a_number_hides_no_loss_and_is_none() -> None:
    numbers, unknown = BlockNumbers(), 2**64 - 1
    assert numbers.gap(10) == []
    assert numbers.gap(unknown) == []
    assert numbers.name(unknown) == 11
    assert numbers.gap(12) == []
    assert numbers.gap(unknown) == []
    assert numbers.gap(16) == [13, 14]
    assert numbers.name(16) == 16
    assert (numbers.missed, numbers.renumbered) == (2, 0)
