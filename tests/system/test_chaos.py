"""The short form of tests/chaos.py: a few hundred triggers under every kind of fault."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from chaos import Chaos


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
