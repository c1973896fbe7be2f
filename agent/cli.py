"""The command line."""

import sys
from pathlib import Path
from typing import Any

import click
import tomli_w

from flawline import __version__
from flawline.config.errors import FlawlineError
from flawline.config.sources import load_settings


@click.group()
@click.version_option(__version__, prog_name="flawline")
def cli() -> None:
    """A streaming edge inspection agent for production lines."""


@cli.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="the TOML file to check")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="override one key")
def check(file: Path | None, overrides: tuple[str, ...]) -> None:
    """Validate a configuration and print the effective one."""
    settings = load_settings(file, overrides)
    click.echo(tomli_w.dumps(_without_none(settings.model_dump(mode="json"))), nl=False)


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
