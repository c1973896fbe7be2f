"""Agents for the tests of the preview."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from preview_line import Agent


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One for a whole module: its tests leave it as they found it."""
    running = Agent(tmp_path_factory.mktemp("line")).start()
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """One of a test's own, with settings of its own."""
    running: list[Agent] = []

    def begin(*settings: str) -> Agent:
        running.append(Agent(tmp_path, *settings).start())
        return running[-1]

    yield begin
    for one in running:
        one.stop()
