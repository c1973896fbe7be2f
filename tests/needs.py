"""What a test wants of the machine: it is skipped where something is not installed, or fails where all must be."""

import os

import pytest


def need(found: object, what: str) -> None:
    """Skip where `found` is false; fail where FLAWLINE_REQUIRE_ALL=1 demands everything."""
    if found:
        return
    if os.environ.get("FLAWLINE_REQUIRE_ALL") == "1":
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")
