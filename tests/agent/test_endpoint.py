"""Socket files: bound over what a killed program left, never over a living one, and gone when their socket is."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from flawline.agent.endpoint import Endpoint, has_ipv6
from flawline.config.errors import ConfigError


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_a_socket_file_goes_with_its_socket(tmp_path: Path, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "verdicts"))
    left.close()  # as kill -9 leaves it
    address = f"ipc://{tmp_path}/verdicts"
    publisher = context.socket(zmq.PUB)
    endpoint = Endpoint(publisher, address, "publish.endpoint")
    with pytest.raises(
        ConfigError, match=r"^control\.endpoint: ipc://.*/verdicts cannot be bound: Address already in use$"
    ):
        Endpoint(context.socket(zmq.ROUTER), address, "control.endpoint")
    reader = context.socket(zmq.SUB)
    reader.subscribe("")
    reader.setsockopt(zmq.RCVTIMEO, 20_000)
    reader.connect(address)
    while reader.poll(20) == 0:
        publisher.send(b"still here")  # the first socket has kept its readers
    assert reader.recv() == b"still here"
    publisher.close(0)
    endpoint.remove_file()
    assert list(tmp_path.iterdir()) == []


def test_anothers_file_stays(tmp_path: Path, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    publisher = context.socket(zmq.PUB)
    endpoint = Endpoint(publisher, f"ipc://{tmp_path}/verdicts", "publish.endpoint")
    (tmp_path / "verdicts").rename(tmp_path / "old")
    (tmp_path / "verdicts").write_text("another's")
    publisher.close(0)
    endpoint.remove_file()
    assert {file.name for file in tmp_path.iterdir()} == {"verdicts", "old"}


@pytest.mark.parametrize("address", ["nonsense", "ipc:///nowhere/at/all", "tcp://256.1.1.1:1"])
def test_what_cannot_be_bound_is_named(address: str, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    with pytest.raises(ConfigError, match="publish.endpoint: " + address):
        Endpoint(context.socket(zmq.PUB), address, "publish.endpoint")


def test_an_address_of_ipv6_is_bound_and_answers() -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as bound, context.socket(zmq.SUB) as heard:
        probe = socket.socket(socket.AF_INET6)
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
        address = f"tcp://[::1]:{probe.getsockname()[1]}"
        probe.close()
        Endpoint(bound, address, "publish.endpoint")
        heard.setsockopt(zmq.IPV6, has_ipv6(address))
        heard.setsockopt(zmq.RCVTIMEO, 20_000)
        heard.subscribe(b"")
        heard.connect(address)
        poller = zmq.Poller()
        poller.register(heard, zmq.POLLIN)
        for _ in range(200):
            bound.send(b"verdict")
            if poller.poll(100):
                break
        assert heard.recv() == b"verdict"
    assert not has_ipv6("tcp://localhost:5555")
