"""A sequence number is never used twice, whatever the file went through."""

from pathlib import Path

from flawline.agent.numbers import BLOCK, NumberMark


def test_numbers_are_reserved_ahead_and_kept(tmp_path: Path) -> None:
    mark = NumberMark(tmp_path / "seq.mark")
    assert mark.fresh
    mark.reserve(1)
    mark.used_without_journal(5)
    mark.close()
    again = NumberMark(tmp_path / "seq.mark")
    assert not again.fresh
    assert (again.reserved, again.floor) == (1 + BLOCK, 5)
    again.close()


def test_a_torn_write_leaves_the_copy_before(tmp_path: Path) -> None:
    path = tmp_path / "seq.mark"
    mark = NumberMark(path)
    mark.reserve(1)
    mark.reserve(2000)
    mark.close()
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # the newer copy
    path.write_bytes(data)
    torn = NumberMark(path)
    assert torn.reserved == 1 + BLOCK
    torn.close()
