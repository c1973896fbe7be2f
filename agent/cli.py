"""The command line."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import structlog
import tomli_w
import zmq
from click.exceptions import NoArgsIsHelpError

from flawline import __version__
from flawline.agent.app import run_agent
from flawline.agent.cli_bench import bench
from flawline.agent.cli_cameras import cameras
from flawline.agent.cli_inspect import inspect
from flawline.agent.cli_learn import learn
from flawline.agent.cli_models import models
from flawline.agent.cli_service import SERVICE
from flawline.agent.cli_training import train_demo
from flawline.agent.cli_workbench import WORKBENCH
from flawline.agent.control import ask
from flawline.agent.guard import refuse_open
from flawline.agent.security import Curve, make_keys
from flawline.agent.subscriber import Subscriber
from flawline.camera.registry import LibraryMissing, make_camera
from flawline.config.errors import BundleError, ConfigError, FlawlineError
from flawline.config.logging import set_up_logging, to_journald
from flawline.config.memory_versions import stored_sha256
from flawline.config.passwords import hide_passwords
from flawline.config.settings import LogSettings, Settings, WorkerSettings
from flawline.config.sources import load_settings
from flawline.models.bundle import open_bundle

_DRIVERS_S = 2.0  # that threads may take to end
_PATIENCE_S = 10.0  # of `subscribe` with a gap that nobody heals
_SILENT = "no agent there, a firewall, or, where it demands CURVE, keys that it does not know"
_TEXTS = {"camera", "label", "note", "part_id", "recipe", "trigger_id", "who"}  # of a request, whatever they look like
_LARGEST_SEQ = 2**63 - 1  # of the journal and of msgpack


@click.group()
@click.version_option(__version__, prog_name="flawline")
def cli() -> None:
    """A streaming edge inspection agent for production lines."""


@cli.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="the TOML file")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="override one key")
@click.option("--frames", type=click.IntRange(min=1), help="stop after so many verdicts")
@click.option("--check", is_flag=True, help="validate, print the effective configuration, and stop")
def run(file: Path | None, overrides: tuple[str, ...], frames: int | None, check: bool) -> None:
    """Run the agent."""
    settings = load_settings(file, overrides)
    if check:
        _check(settings)
        click.echo(hide_passwords(tomli_w.dumps(_without_none(settings.model_dump(mode="json")))), nl=False)
        return
    set_up_logging(settings.log, station=settings.station)
    folder = None if file is None else file.resolve().parent
    asyncio.run(run_agent(settings, frames, lambda: load_settings(file, overrides), folder))
    _leave_hanging_drivers()


def _check(settings: Settings) -> None:
    """What a start would refuse of addresses, cameras and memories, without opening, binding or loading any.

    Key files are not looked at: on a station the service has them. A camera's library that is missing is only said:
    files are also checked where the camera is not. Raises ConfigError.
    """
    _check_bundle(settings)
    Curve.files("publish", settings.publish)
    Curve.files("control", settings.control, settings.publish)
    if settings.preview.enabled:
        refuse_open(settings.preview)
    for camera in settings.cameras:
        try:
            make_camera(camera)
        except LibraryMissing as error:
            click.echo(f"warning: {error}", err=True)
    for recipe in settings.recipes.values():
        if recipe.memory is not None:
            stored_sha256(Path(recipe.memory))


def _check_bundle(settings: Settings) -> None:
    """A folder must be there; a name is only said to be missing: who checks may have other bundles than the service."""
    if settings.worker.engine != WorkerSettings().engine:
        return
    try:
        open_bundle(settings.model.bundle)
    except BundleError as error:
        if "/" in settings.model.bundle:
            raise
        click.echo(f"warning: model.bundle: {error}", err=True)


def _leave_hanging_drivers() -> None:
    """The interpreter waits at its end for every thread, and one in a camera's driver may never come back.

    Everything of ours is written and closed by now.
    """
    end = time.monotonic() + _DRIVERS_S
    for thread in threading.enumerate():
        if thread.name.startswith(("camera-", "trigger")):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                structlog.get_logger().error("left_hanging", thread=thread.name)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)


def _with_keys(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a client to an agent that demands CURVE."""
    path = click.Path(path_type=Path)
    command = click.option("--server-key", type=path, help="CURVE: file with the agent's public key")(command)
    return click.option("--client-key", type=path, help="CURVE: file with our own secret key")(command)


def _keys(server_key: Path | None, client_key: Path | None) -> tuple[Path, Path] | None:
    if server_key is None and client_key is None:
        return None
    if server_key is None or client_key is None:
        raise ConfigError("--server-key and --client-key: CURVE needs both")
    return server_key, client_key


@cli.command()
@click.option("--endpoint", default="tcp://127.0.0.1:5555", show_default=True, help="where an agent publishes")
@click.option("--topic", default="verdict/", show_default=True, help="topics that begin so")
@click.option("--count", type=click.IntRange(min=1), help="stop after so many messages")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
@click.option("--from-seq", type=click.IntRange(min=1), help="begin with the journal's verdicts from this number on")
@click.option("--control", help="where gaps are healed by replay; left out: what the agent's status names")
@_with_keys
def subscribe(
    endpoint: str,
    topic: str,
    count: int | None,
    as_json: bool,
    from_seq: int | None,
    control: str | None,
    server_key: Path | None,
    client_key: Path | None,
) -> None:
    """Print verdicts as they arrive, gapless; where a gap cannot be healed for ten seconds, go on behind it."""
    set_up_logging(LogSettings(level="warning"))
    shown, silent = 0, False
    keys = _keys(server_key, client_key)
    try:
        with Subscriber(
            endpoint, topic, control=control, from_seq=from_seq, keys=keys, patience_s=_PATIENCE_S
        ) as subscriber:
            while count is None or shown < count:
                received = subscriber.receive(0.5)
                if subscriber.silent and not silent:
                    click.echo(f"flawline: {endpoint} is silent: {_SILENT}", err=True)
                silent = subscriber.silent
                if received is None or not received.topic.startswith(topic):
                    continue
                shown += 1
                if as_json:
                    click.echo(json.dumps(received.header))
                else:
                    keys_shown = ("seq", "camera", "frame_id", "result", "reason", "score")
                    click.echo(" ".join([received.topic, *(f"{key}={received.header.get(key)}" for key in keys_shown)]))
    except zmq.ZMQError as error:
        raise ConfigError(f"--endpoint {endpoint}: {error}") from error
    except KeyboardInterrupt:
        pass


@cli.command()
@click.option("--from-seq", type=click.IntRange(1, _LARGEST_SEQ), required=True, help="the first verdict")
@click.option("--to-seq", type=click.IntRange(1, _LARGEST_SEQ), help="the last verdict; left out: the newest")
@click.option("--endpoint", default="tcp://127.0.0.1:5556", show_default=True, help="where an agent takes commands")
@_with_keys
def replay(from_seq: int, to_seq: int | None, endpoint: str, server_key: Path | None, client_key: Path | None) -> None:
    """Fetch journalled verdicts from a running agent, one JSON object a line."""
    done = False
    keys = _keys(server_key, client_key)
    while not done:
        request = {"cmd": "replay", "id": 1, "from_seq": from_seq, "to_seq": to_seq}
        try:
            reply = ask(endpoint, request, keys=keys)
        except ValueError as error:
            raise FlawlineError(f"replay from {from_seq}: {error}") from error
        for verdict in reply["verdicts"]:
            click.echo(json.dumps(verdict))
        from_seq, done = reply["next_seq"], reply["done"]


@cli.command()
@click.argument("seq", type=click.IntRange(1, _LARGEST_SEQ))
@click.option("--good/--bad", "good", default=None, required=True, help="what the part is, whatever the verdict says")
@click.option("--who", required=True, help="who says so; kept with it")
@click.option("--note", default="", help="a remark; kept with it")
@click.option("--endpoint", default="tcp://127.0.0.1:5556", show_default=True, help="where an agent takes commands")
@_with_keys
def feedback(
    seq: int, good: bool, who: str, note: str, endpoint: str, server_key: Path | None, client_key: Path | None
) -> None:
    """Tell a running agent what the part of verdict SEQ is; `flawline learn --from-feedback` learns from it."""
    request = {"cmd": "feedback", "id": 1, "seq": seq, "label": "good" if good else "bad", "who": who, "note": note}
    try:
        ask(endpoint, request, keys=_keys(server_key, client_key))
    except ValueError as error:
        raise FlawlineError(f"verdict {seq}: {error}") from error


@cli.command("ask")
@click.argument("cmd")
@click.argument("fields", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--endpoint", default="tcp://127.0.0.1:5556", show_default=True, help="where an agent takes commands")
@click.option("--timeout-s", default=60.0, show_default=True, help="for the reply; `learn.commit` takes longest")
@_with_keys
def ask_agent(
    cmd: str,
    fields: tuple[str, ...],
    endpoint: str,
    timeout_s: float,
    server_key: Path | None,
    client_key: Path | None,
) -> None:
    """Send one control command to a running agent and print its reply, one JSON object.

    `flawline ask trigger camera=top part_id=4711`, `flawline ask learn.start camera=top count=16`,
    `flawline ask pause`. A VALUE that is JSON (a number, true, a table) is that, else a text.
    """
    request: dict[str, Any] = {"cmd": cmd, "id": 1}
    for field in fields:
        key, equals, text = field.partition("=")
        if not equals:
            raise ConfigError(f"{field!r}: write KEY=VALUE")
        request[key] = text if key in _TEXTS else _value(text)
    try:
        reply = ask(endpoint, request, timeout_s, _keys(server_key, client_key))
    except ValueError as error:
        raise FlawlineError(f"{cmd}: {error}") from error
    click.echo(json.dumps({key: value for key, value in reply.items() if key not in ("id", "ok")}))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
def keys(folder: Path, name: str) -> None:
    """Make a CURVE key pair: FOLDER/NAME.secret (mode 0600) and FOLDER/NAME.public.

    The agent's own secret goes into publish.curve_secret; a client's .public into the folder publish.curve_clients.
    """
    for file in make_keys(folder, name):
        click.echo(file)


for command in (
    *SERVICE,
    *WORKBENCH,
    bench,
    cameras,
    inspect,
    learn,
    models,
    train_demo,
):
    cli.add_command(command)


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is not set is left out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def main() -> None:
    """Run the command line; wrong usage, and every error that flawline raises on purpose, is one line on stderr."""
    try:
        sys.exit(cli.main(prog_name="flawline", standalone_mode=False))
    except FlawlineError as error:
        _fail(str(error), error.exit_code)
    except NoArgsIsHelpError as error:  # a command that needs a sub-command, called without: its help is the answer
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        _fail(error.format_message() + (f" (see {where.command_path} --help)" if where else ""), error.exit_code)
    except click.Abort:
        _fail("aborted", 1)
    except BrokenPipeError:  # who reads has had enough: `flawline replay --from-seq 1 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(text: str, exit_code: int) -> NoReturn:
    """In a service a line of the log as every other, so that its priority is known."""
    sentence = " ".join(line.strip() for line in text.splitlines())
    if to_journald():
        if not structlog.is_configured():  # the settings did not load
            set_up_logging(LogSettings())
        structlog.get_logger().error("failed", error=sentence, exit_code=exit_code)
    else:
        click.echo("flawline: " + sentence, err=True)
    sys.exit(exit_code)
