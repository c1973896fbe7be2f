"""Addresses of sockets: what is none is refused by its key, before ZeroMQ makes another of it."""

import pytest

from flawline.config.errors import ConfigError
from flawline.config.sources import load_settings

WRONG = (
    "tcp://127.0.0.1:99999",
    "tcp://127.0.0.1:0",
    "tcp://127.0.0.1:*",
    "tcp://127.0.0.1",
    "tcp://[::1",
    "tcp://:5555",
    "http://127.0.0.1:5555",
    "ipc://",
    "nonsense",
    "",
)


@pytest.mark.parametrize("key", ["publish.endpoint", "control.endpoint"])
@pytest.mark.parametrize("address", WRONG)
def test_what_is_no_address_is_refused(key: str, address: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_settings(None, [f"{key}={address}"], environ={})


@pytest.mark.parametrize("address", ["tcp://*:5555", "tcp://eth0:5555", "tcp://[::1]:5555", "ipc:///run/x", "ipc://@x"])
def test_what_zeromq_can_bind_is_taken(address: str) -> None:
    assert load_settings(None, [f"publish.endpoint={address}"], environ={}).publish.endpoint == address
