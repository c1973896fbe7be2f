"""Stations that end with their test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from station import Make, Station


@pytest.fixture
def make_station(tmp_path: Path) -> Iterator[Make]:
    """Makes stations in the test's folder."""
    stations: list[Station] = []

    def make(*arguments: Any, **more: Any) -> Station:
        folder = tmp_path / f"station{len(stations)}"
        folder.mkdir()
        stations.append(Station(folder, *arguments, **more))
        return stations[-1]

    yield make
    for station in stations:
        station.close()
