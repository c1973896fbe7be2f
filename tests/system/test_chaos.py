"""The short form of tests/chaos.py: a few hundred triggers under every kind of fault."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from chaos import Chaos
from chaos_ledgers import Ledgers, Orders, Sent, misplaced


@pytest.mark.parametrize(
    ("shift", "found"),
    [({}, 0), ({"frame_id": 1}, 9), ({"t_grab": -1000}, 9), ({"trigger": 1}, 9)],
    ids=["none", "results against pictures", "pictures older than their triggers", "triggers against pictures"],
)
def test_the_reckoning_sees_a_shift_of_pictures_against_triggers(shift: dict[str, int], found: int) -> None:
    orders: Orders = {"third": [("good", 0), ("bad", 0)] * 5}
    books = Ledgers({f"T{number:06}": Sent("third", 0.0, "accepted", 1000 * number) for number in range(10)})
    headers = [
        {
            **{"camera": "third", "boot_id": "one", "trigger_id": f"T{number:06}"},
            "frame_id": number + shift.get("frame_id", 0),
            "t_grab": 1000 * (number - shift.get("trigger", 0)) + 500 + shift.get("t_grab", 0),
            "result": ("pass", "fail")[number % 2],
        }
        for number in range(10)
    ]
    headers.append({"camera": "third", "boot_id": "two", "trigger_id": "T000003", "frame_id": None})
    assert misplaced(books, orders, headers) >= found
    assert (misplaced(books, orders, headers) > 0) == bool(shift)
    swapped = [*headers[:4], headers[4] | {"frame_id": 6}, *headers[5:]]
    assert misplaced(books, orders, swapped) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ledgers_agree_whatever_happens(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, triggers=400, fuzz=2000, seed=3, pause_s=0.8, least_faults=6)
    try:
        report = chaos.run()
    finally:
        chaos.station.close()
    assert report.flawless, report
    assert report.accepted >= 400
    assert report.fuzz == 2000
    assert sum(report.faults.values()) >= 6, "the harness did nothing"
    assert report.results.get("pass", 0) > 20
