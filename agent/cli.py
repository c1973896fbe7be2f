"""The command line."""

import asyncio
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import click
import tomli_w
import zmq

from flawline import __version__
from flawline.agent.app import run_agent
from flawline.agent.cli_cameras import cameras
from flawline.agent.control import ask
from flawline.agent.wire import unpack
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.logging import set_up_logging
from flawline.config.sources import load_settings


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
        click.echo(tomli_w.dumps(_without_none(settings.model_dump(mode="json"))), nl=False)
        return
    set_up_logging(settings.log, station=settings.station)
    try:
        sys.exit(asyncio.run(run_agent(settings, frames)))
    except ExceptionGroup as group:  # of the tasks: one that fails on purpose says it in one line
        error: Exception = group.subgroup(FlawlineError) or group
        while isinstance(error, ExceptionGroup) and error is not group:
            error = error.exceptions[0]
        raise error from None


@cli.command()
@click.option("--endpoint", default="tcp://127.0.0.1:5555", show_default=True, help="where an agent publishes")
@click.option("--topic", default="verdict/", show_default=True, help="topics that begin so")
@click.option("--count", type=click.IntRange(min=1), help="stop after so many messages")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def subscribe(endpoint: str, topic: str, count: int | None, as_json: bool) -> None:
    """Print verdicts as they arrive."""
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    try:
        socket.connect(endpoint)
        for _ in range(count) if count else itertools.count():
            name, header, *_rest = socket.recv_multipart()
            message = unpack(header)
            if as_json:
                click.echo(json.dumps(message))
            else:
                shown = {key: message.get(key) for key in ("seq", "camera", "frame_id", "result", "reason", "score")}
                click.echo(f"{name.decode()} " + " ".join(f"{key}={value}" for key, value in shown.items()))
    except zmq.ZMQError as error:
        raise ConfigError(f"--endpoint {endpoint}: {error}") from error
    except KeyboardInterrupt:
        pass
    finally:
        context.destroy(linger=0)


@cli.command()
@click.option("--from-seq", type=click.IntRange(min=1), required=True, help="the first verdict")
@click.option("--to-seq", type=click.IntRange(min=1), help="the last verdict; left out: the newest")
@click.option("--endpoint", default="tcp://127.0.0.1:5556", show_default=True, help="where an agent takes commands")
def replay(from_seq: int, to_seq: int | None, endpoint: str) -> None:
    """Fetch journalled verdicts from a running agent, one JSON object a line."""
    done = False
    while not done:
        reply = ask(endpoint, {"cmd": "replay", "id": 1, "from_seq": from_seq, "to_seq": to_seq})
        for verdict in reply["verdicts"]:
            click.echo(json.dumps(verdict))
        from_seq, done = reply["next_seq"], reply["done"]


cli.add_command(cameras)


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is not set is left out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def main() -> None:
    """Run the command line; every error that flawline raises on purpose is one line on stderr."""
    try:
        cli()
    except FlawlineError as error:
        click.echo(f"flawline: {error}", err=True)
        sys.exit(error.exit_code)
