"""A station whose addresses come after it, as at boot: it waits for them, and only for them."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from notify_socket import NotifySocket
from station import free_port

from flawline.agent.addresses import until_there
from flawline.agent.notify import ServiceManager
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.sources import load_settings

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]
NOWHERE = "192.0.2.7"  # for documentation (RFC 5737): no machine has it
# A network of its own, with a card that has no address.
ALONE = ["unshare", "--user", "--map-root-user", "--net"]
ALONE += ["sh", "-c", 'ip link set lo up && ip link add plant0 type bridge && exec "$@"', "sh"]
Start = Callable[..., subprocess.Popen[bytes]]


def may_be_alone() -> bool:
    return shutil.which("ip") is not None and subprocess.run([*ALONE, "true"], check=False).returncode == 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "line.toml"
    file.write_text(
        f'[publish]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n[control]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n'
        f'[preview]\nport = {free_port()}\n[journal]\npath = "state"\n'
        '[worker]\nengine = "flawline.models.noop:NoopEngine"\n'
    )
    return file


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[NotifySocket]:
    listener = NotifySocket(str(tmp_path / "notify"))
    yield listener
    listener.socket.close()


@pytest.fixture
def start(config: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str, before: list[str] | None = None) -> subprocess.Popen[bytes]:
        command = [*(before or []), *CLI, "run", "--config", str(config), *options]
        environment = os.environ | {"NOTIFY_SOCKET": str(config.parent / "notify")}
        with (config.parent / "log").open("ab") as log:
            running.append(subprocess.Popen(command, stderr=log, env=environment))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait(30)


def test_addresses_that_come_later_are_waited_for(start: Start, systemd: NotifySocket, config: Path) -> None:
    if not may_be_alone():
        pytest.skip("needs a network namespace")
    addresses = {"publish.endpoint": f"tcp://{NOWHERE}:5555", "control.endpoint": "tcp://plant0:5556"}
    addresses["preview.host"] = NOWHERE
    options = [f"--set={key}={address}" for key, address in addresses.items()]
    agent = start(*options, *(f"--set={key.split('.')[0]}.insecure=true" for key in addresses), before=ALONE)
    waits = systemd.until("STATUS=starting; waiting for an address: ")
    assert all(f"{key} {address}" in waits for key, address in addresses.items())
    for _ in range(2):  # again and again
        systemd.until("EXTEND_TIMEOUT_USEC=")
    enter = ["nsenter", "--target", str(agent.pid), "--user", "--net", "--preserve-credentials"]
    subprocess.run([*enter, "ip", "address", "add", f"{NOWHERE}/24", "dev", "plant0"], check=True)
    systemd.until("READY=1")
    agent.send_signal(signal.SIGTERM)
    log = (config.parent / "log").read_text()
    assert agent.wait(60) == 0, log
    for event in ("address_is_not_there_yet", "address_is_there"):
        for key in addresses:
            said = [line for line in log.splitlines() if f'"event": "{event}"' in line and key in line]
            assert len(said) == 1, log


@pytest.mark.parametrize(
    "options",
    [
        ("--set", f"preview.host={NOWHERE}", "--set", "preview.insecure=true"),
        ("--set", f"publish.endpoint=tcp://{NOWHERE}:5555", "--set", "publish.insecure=true"),
        ("--set", "control.endpoint=tcp://nosuchcard0:5555", "--set", "control.insecure=true"),
    ],
)
def test_sigterm_ends_the_wait(start: Start, systemd: NotifySocket, config: Path, options: tuple[str, ...]) -> None:
    agent = start(*options)
    assert options[1].split("=")[0] in systemd.until("STATUS=starting; waiting for an address: ")
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(10) == 0, (config.parent / "log").read_text()


def test_an_address_that_does_not_come_is_no_wrong_configuration(config: Path) -> None:
    settings = load_settings(config, [f"preview.host={NOWHERE}", "preview.insecure=true"], environ={})
    with pytest.raises(FlawlineError, match=f"^preview.host: {NOWHERE} cannot be bound") as raised:
        asyncio.run(until_there(settings, ServiceManager({}), limit_s=0.0))
    assert raised.value.exit_code == 1


def test_what_would_be_refused_is_not_waited_for(config: Path) -> None:
    settings = load_settings(config, [f"publish.endpoint=tcp://{NOWHERE}:5555"], environ={})
    with pytest.raises(ConfigError, match="is reached from other machines"):
        asyncio.run(until_there(settings, ServiceManager({})))


@pytest.mark.parametrize("address", ["tcp://256.1.1.1:1", "tcp://no such:1", "tcp://[::1]:1"])
def test_no_other_address_is_waited_for(config: Path, address: str) -> None:
    settings = load_settings(config, [f"publish.endpoint={address}", "publish.insecure=true"], environ={})
    assert asyncio.run(until_there(settings, ServiceManager({}), limit_s=0.0))
