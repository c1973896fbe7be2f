"""Where the memories of a recipe are kept: numbered files in one folder, none ever overwritten; which one judges."""

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from flawline.config.errors import ConfigError
from flawline.config.recipe_file import update_recipe

MOST_STEPS = 100  # back
FOLDER = "memory"  # next to the configuration's file, or in the journal's folder
_NAME = re.compile(r"(?P<recipe>[A-Za-z0-9_-]+)\.(?P<version>\d{4,})\.(?P<sha>[0-9a-f]{12})\.safetensors")


def versions(folder: Path, recipe: str) -> dict[int, Path]:
    """The recipe's memories by number, rising."""
    found = {}
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and match["recipe"] == recipe:
            found[int(match["version"])] = path
    return dict(sorted(found.items()))


def next_file(folder: Path, recipe: str, sha256: str) -> Path:
    """The file for a memory of this content: the one that is there, else that of the next number."""
    known = versions(folder, recipe)
    for path in known.values():
        if path.name.endswith(f".{sha256[:12]}.safetensors"):
            return path
    return folder / f"{recipe}.{max(known, default=0) + 1:04}.{sha256[:12]}.safetensors"


def previous_file(current: Path) -> Path | None:
    """The version before this one; None where it is the first. Raises ConfigError for a name that has no number."""
    match = _NAME.fullmatch(current.name)
    if match is None:
        raise ConfigError(f"{current}: is not one of the numbered memories that `flawline learn` writes")
    earlier = [
        path for number, path in versions(current.parent, match["recipe"]).items() if number < int(match["version"])
    ]
    return earlier[-1] if earlier else None


def is_numbered(file: Path) -> bool:
    """Whether a file is one of a recipe's versions."""
    return _NAME.fullmatch(file.name) is not None


def pending_file(folder: Path, recipe: str, sha256: str) -> Path:
    """The file for a memory that does not judge yet: it has no number, so no rollback leads to it."""
    return folder / f"{recipe}.pending.{sha256[:12]}.safetensors"


def number_pending(pending: Path, recipe: str, sha256: str) -> Path:
    """Make a pending memory a version; returns its file. Raises ConfigError naming it."""
    path = next_file(pending.parent, recipe, sha256)
    try:
        pending.replace(path)
    except OSError as error:
        raise ConfigError(f"{pending}: cannot be renamed to {path.name}: {error.strerror or error}") from error
    return path


def activate(file: Path, recipe: str, memory: Path | None, former: str | None) -> None:
    """Write into the configuration which memory the recipe judges by, instead of `former`; None: by words alone.

    As a whole or not at all. A running agent takes it up when it reloads its configuration. What was in use before is
    remembered, to go back to: of two numbers the smaller one need not have been.
    """
    _write(file, recipe, memory)
    if former != (None if memory is None else str(memory.resolve())):
        _keep_history(file, recipe, [*_history(file, recipe), former or ""])


def roll_back(file: Path, recipe: str, current: Path) -> Path | None:
    """Back to what was in use before `current`; returns it, None for words alone. Raises ConfigError, also where only
    the numbers could tell it and another configuration in the folder shares them."""
    history = _history(file, recipe)
    if not history and not _alone(file):
        raise ConfigError(
            f"{file}: nothing tells what recipes.{recipe} was judged by before, and the numbers in {current.parent} "
            "are also those of the other configurations beside it; write the memory, or none, into the recipe by hand"
        )
    former = (Path(history[-1]) if history[-1] else None) if history else previous_file(current)
    if former is not None and not former.is_file():
        raise ConfigError(f"{former}: the memory that was in use before is not there any more")
    _write(file, recipe, former)
    _keep_history(file, recipe, history[:-1])
    return former


def _history_file(file: Path, recipe: str) -> Path:
    """Of this configuration alone: stations whose files lie in one folder share memories and their numbers."""
    target = file.resolve()
    return target.parent / FOLDER / f"{target.stem}.{recipe}.history"


def _alone(file: Path) -> bool:
    """Whether no other configuration lies in the folder."""
    target = file.resolve()
    return all(path == target or path.name.startswith(".") for path in target.parent.glob("*.toml"))


def _history(file: Path, recipe: str) -> list[str]:
    """The memories that were in use before, the last one last; "" for none."""
    path = _history_file(file, recipe)
    if not path.exists() and _alone(file):
        path = path.with_name(f"{recipe}.history")  # as it was called once
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _keep_history(file: Path, recipe: str, history: list[str]) -> None:
    path = _history_file(file, recipe)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(f"{entry}\n" for entry in history[-MOST_STEPS:]), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write(file: Path, recipe: str, memory: Path | None) -> None:
    if memory is None:
        update_recipe(file, recipe, {"memory": None})
        return
    base, target = file.resolve().parent, memory.resolve()
    text = os.path.relpath(target, base) if target.is_relative_to(base) else str(target)
    update_recipe(file, recipe, {"memory": text})


def learnt_sha256(memory: str, folders: Iterable[Path]) -> str:
    """`stored_sha256` of what a stranger names. Raises ConfigError, for whatever does not lie in one of the folders
    that `flawline learn` and `learn.commit` write to the same one: whether it is there is not said."""
    found = os.path.realpath(memory) if os.path.isabs(memory) else ""
    if not any(os.path.dirname(found) == os.path.realpath(folder) for folder in folders):
        there = ", ".join(str(folder) for folder in folders)
        raise ConfigError(
            f"memory: {memory[:200]!r} is no memory of this station; name one by its whole path, of {there}"
        )
    return stored_sha256(Path(memory), follow=False)


def stored_sha256(file: Path, *, follow: bool = True) -> str:
    """The hash of its content that a memory's file names; the worker checks that it is true.

    Reads the head of a safetensors file: its length in 8 bytes, then JSON. Raises ConfigError naming the file, also
    for what is no file (to open a pipe would wait for ever) and, unless it shall `follow`, for a link.
    """
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        opened = os.open(file, flags)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise ConfigError(f"{file}: is not a readable memory: it is no regular file")
        with os.fdopen(opened, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = json.loads(stream.read(min(length, 1 << 20)))
        return str(head["__metadata__"]["sha256"])
    except OSError as error:
        raise ConfigError(f"{file}: the memory cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # brackets within brackets
        raise ConfigError(f"{file}: is not a readable memory") from error
