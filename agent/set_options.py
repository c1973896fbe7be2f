"""Options of the commands that read a data set."""

from pathlib import Path

import click

KIND = click.Choice(["mvtec", "visa", "folder"])
FOLDER = click.Path(path_type=Path, file_okay=False)


def split(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """`--category a,b --category c` -> a, b, c."""
    return [name for value in values for name in value.split(",") if name]
