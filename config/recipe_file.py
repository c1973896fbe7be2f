"""Writing a recipe's values back into the TOML file, comments and order kept."""

import contextlib
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import InlineTable, Table

from flawline.config.errors import ConfigError
from flawline.config.sources import load_settings


def update_recipe(file: Path, recipe: str, values: Mapping[str, Any]) -> None:
    """Set keys of `[recipes.NAME]`; a mapping becomes a table below it, None takes a key out. The recipe is made
    where it is missing.

    The file is replaced as a whole, and only by one that loads. Raises ConfigError naming the file.
    """
    try:
        document = tomlkit.parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not valid TOML: {error}") from error
    recipes = document.get("recipes")
    if recipes is None:
        recipes = document["recipes"] = tomlkit.table(is_super_table=True)
    if isinstance(recipes, InlineTable):
        recipes = document["recipes"] = _as_table(recipes, is_super_table=True)
    table: Any = recipes.get(recipe)
    if table is None:
        table = recipes[recipe] = tomlkit.table()
    elif isinstance(table, InlineTable):  # which holds no tables
        table = recipes[recipe] = _as_table(table)
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = tomlkit.table()
            for name, item in value.items():
                inner[name] = item
            table[key] = inner
        elif value is None:
            table.pop(key, None)
        else:
            table[key] = value
    text = tomlkit.dumps(document)
    wanted = tomllib.loads(tomlkit.dumps({key: value for key, value in values.items() if value is not None}))
    placed = tomllib.loads(text)["recipes"].get(recipe, {})
    if any(placed.get(key) != value for key, value in wanted.items()):  # tomlkit and dotted keys
        raise ConfigError(f"{file}: recipe {recipe} has to be a table of its own to be written to: [recipes.{recipe}]")
    load_settings(file, environ={}, text=text)
    _replace(file, text)


def _as_table(inline: InlineTable, *, is_super_table: bool | None = None) -> Table:
    table = tomlkit.table(is_super_table=is_super_table)
    for key, value in inline.items():
        table[key] = value
    return table


def give(file: Path | int, uid: int, gid: int) -> None:
    """A path's or descriptor's file to this owner and group, as far as we may; -1: as it is."""
    for ids in ((-1, gid), (uid, -1)):
        with contextlib.suppress(OSError):
            os.chown(file, *ids)


def _replace(file: Path, text: str) -> None:
    target = file.resolve()  # a linked file stays a link
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".toml", dir=target.parent)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        there = target.stat()
        give(temporary, there.st_uid, there.st_gid)
        temporary.chmod(there.st_mode & 0o7777)
        temporary.replace(target)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
