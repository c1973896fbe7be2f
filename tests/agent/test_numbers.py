"""A sequence number is never used twice, whatever the file went through."""

from pathlib import Path

import pytest

from flawline.agent import numbers
from flawline.agent.numbers import BLOCK, NumberMark


def test_numbers_are_reserved_ahead_and_kept(tmp_path: Path) -> None:
    mark = NumberMark(tmp_path / "seq.mark")
    mark.reserve(1)
    mark.used(5, {"top": 4})
    mark.close()
    again = NumberMark(tmp_path / "seq.mark")
    assert (again.reserved, again.floor, again.cameras) == (1 + BLOCK, 5, {"top": 4})
    again.close()


def test_a_torn_write_leaves_the_copy_before(tmp_path: Path) -> None:
    path = tmp_path / "seq.mark"
    mark = NumberMark(path)  # turn 1
    mark.reserve(1)  # turn 2
    mark.reserve(2000)  # turn 3, in the second half
    mark.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 20] ^= 0xFF
    path.write_bytes(data)
    torn = NumberMark(path)
    assert torn.reserved == 1 + BLOCK
    torn.close()


def test_power_loss_is_told_from_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "seq.mark"
    NumberMark(path).close()
    assert not NumberMark(path).power_lost  # killed, the machine went on
    monkeypatch.setattr(numbers, "machine_boot", lambda: "the next boot")
    after = NumberMark(path)
    assert after.power_lost
    after.used(3, {}, clean=True)
    after.close()
    monkeypatch.setattr(numbers, "machine_boot", lambda: "the boot after that")
    clean = NumberMark(path)
    assert (clean.power_lost, clean.floor) == (False, 3)
