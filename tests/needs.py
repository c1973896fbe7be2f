"""Tools that some tests want and a machine may lack: such a test is skipped, or fails where everything is demanded."""

import os
import shutil

import pytest


def need(found: object, what: str) -> None:
    """Skip where `found` is nothing; fail with FLAWLINE_REQUIRE_ALL=1, as in CI."""
    if found:
        return
    if os.environ.get("FLAWLINE_REQUIRE_ALL") == "1":
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")


def need_command(name: str, package: str) -> str:
    """The path of a program of a Debian package."""
    found = shutil.which(name)
    need(found, f"{name} (apt install {package})")
    assert found is not None
    return found
