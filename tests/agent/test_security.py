"""Keys and the doorkeeper: what one wrong file does to the others, and whose hands a secret may be in."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest
import structlog
import zmq
import zmq.asyncio
from structlog.testing import capture_logs

from flawline.agent.security import Curve, Doorkeeper, connect_curve, make_keys, read_key
from flawline.config.errors import ConfigError


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """With the server's pair, a client's, and the folder of those that may connect."""
    structlog.reset_defaults()
    make_keys(tmp_path, "server")
    make_keys(tmp_path, "gateway")
    (tmp_path / "clients").mkdir()
    return tmp_path


async def is_admitted(keys: Path, patience_s: float = 10.0) -> bool:
    """Whether the client's message arrives, and the doorkeeper still stands afterwards."""
    with zmq.asyncio.Context() as context:
        keeper = Doorkeeper(context, {"control": keys / "clients"})
        standing = asyncio.create_task(keeper.serve())
        server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        try:
            Curve("control", read_key(keys / "server.secret", "secret", "x"), keys / "clients").guard(server)
            port = server.bind_to_random_port("tcp://127.0.0.1")
            connect_curve(client, keys / "server.public", keys / "gateway.secret")
            client.connect(f"tcp://127.0.0.1:{port}")
            await client.send(b"x")
            arrived = bool(await server.poll(int(patience_s * 1000)))
            assert not standing.done()
            return arrived
        finally:
            standing.cancel()
            await asyncio.wait([standing])
            keeper.close()
            server.close(0)
            client.close(0)


async def test_a_name_that_is_no_text_is_left_out_and_the_others_are_admitted(keys: Path) -> None:
    odd = os.fsencode(keys / "clients") + b"/Ger\xe4t.public"
    shutil.copy(keys / "gateway.public", odd)
    with capture_logs() as lines:
        assert not await is_admitted(keys, 1.0)
        shutil.copy(keys / "gateway.public", keys / "clients/plc-1.plant.public")
        assert await is_admitted(keys)
    left_out = [line["file"] for line in lines if line["event"] == "client_key_left_out"]
    assert left_out[0] == os.fsdecode(odd)


async def test_a_handshake_that_goes_wrong_is_refused_and_the_next_is_answered(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, key: bytes) -> str | None:
        raise MemoryError

    shutil.copy(keys / "gateway.public", keys / "clients")
    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(Doorkeeper, "_whose", staticmethod(broken))
        assert not await is_admitted(keys, 1.0)
    assert "handshake_failed" in {line["event"] for line in lines}
    assert await is_admitted(keys)


@pytest.mark.parametrize("name", ["Gerät", "a b", "../up", "", "x" * 65])
def test_no_key_is_made_that_would_not_be_admitted(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        make_keys(tmp_path, name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mode", "fault"),
    [(0o604, "read by everybody"), (0o602, "changed by others"), (0o660, "changed by others"), (0o644, "by everybody")],
)
def test_a_secret_in_others_hands_is_refused(keys: Path, mode: int, fault: str) -> None:
    secret = keys / "server.secret"
    secret.chmod(mode)
    with pytest.raises(ConfigError, match=f"^publish.curve_secret: {secret} can be .*{fault}.*chmod 600"):
        read_key(secret, "secret", "publish.curve_secret")
    read_key(keys / "server.public", "public", "x")  # everybody's


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_group_reads_what_root_gave_it_alone(keys: Path) -> None:
    secret = keys / "server.secret"
    secret.chmod(0o440)  # as systemd's credentials, where access lists show in the group's bits
    os.chown(secret, 0, 65534)
    read_key(secret, "secret", "x")
    os.chown(secret, 65534, 65534)
    with pytest.raises(ConfigError, match="read by a group"):
        read_key(secret, "secret", "x")
