"""Torch as the tests of the models want it: one thread, so that results repeat and busy machines stay usable."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For a whole file; a test that wants more says so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """For files that only run models."""
    with torch.no_grad():
        yield
