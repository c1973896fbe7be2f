"""Where settings come from: the TOML file, then `FLAWLINE_A__B` in the environment, then `--set a.b=value`.

Each later source overrides the earlier ones key by key. Cameras are addressed by name (`cameras.top.fps`).
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.config.settings import Settings
from flawline.config.settings_camera import CameraSettings

PREFIX = "FLAWLINE_"
NOT_SETTINGS = {"FLAWLINE_BUNDLES", "FLAWLINE_SWITCHES", "FLAWLINE_REQUIRE_ALL", "FLAWLINE_SHARED_DATA"}
"""Variables with our prefix that are no settings: the bundle search path, the models' switches, two of the tests."""

CREDENTIALS = "$CREDENTIALS_DIRECTORY"

_PATH_KEYS = {
    ("cameras", "*", "path"),
    ("cameras", "*", "cti"),
    ("journal", "path"),
    ("publish", "curve_secret"),
    ("publish", "curve_clients"),
    ("control", "curve_secret"),
    ("control", "curve_clients"),
    ("preview", "token_file"),
    ("recipes", "*", "memory"),
}


def load_settings(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    text: str | None = None,
) -> Settings:
    """The effective settings; with `text`, as if that stood in the file.

    Raises ConfigError naming the key, variable or file, with the nearest known name.
    """
    tree = read_file(file, text) if file is not None else {}
    environ = os.environ if environ is None else environ
    for variable, value in sorted(environ.items()):
        if variable.startswith(PREFIX) and variable not in NOT_SETTINGS:
            path = variable.removeprefix(PREFIX).split("__")
            _assign(tree, path, value, file, f"environment variable {variable}", any_case=True)
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {item}: write it as a.b=value")
        _assign(tree, key.split("."), value, file, f"--set {key}", any_case=False)
    where = str(file) if file is not None else "settings"
    try:
        return Settings(**tree)
    except ValidationError as error:
        raise ConfigError(explain(error, Settings, where, list(tree.get("cameras", {})))) from error


def chosen_recipe(settings: Settings, name: str, file: Path | None) -> Recipe:
    """The recipe that an option `--recipe` names. Raises ConfigError naming those that there are, and their `file`."""
    if name not in settings.recipes:
        known = ", ".join(sorted(settings.recipes))
        raise ConfigError(f"--recipe {name}: not in {file or 'the defaults'} (there are: {known})")
    return settings.recipes[name]


def read_file(file: Path, text: str | None = None) -> dict[str, Any]:
    """The file's tree, cameras by name, relative paths made absolute. Raises ConfigError naming the file."""
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8") if text is None else text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not valid TOML: {error}") from error
    cameras = tree.get("cameras")
    if cameras is not None:
        if not isinstance(cameras, list) or not all(isinstance(camera, dict) for camera in cameras):
            raise ConfigError(f"{file}: cameras: write each camera as a [[cameras]] table")
        by_name: dict[str, Any] = {}
        for number, camera in enumerate(cameras, start=1):
            name = camera.pop("name", None)
            if not isinstance(name, str):
                raise ConfigError(f"{file}: cameras: camera number {number} has no `name`")
            if name in by_name:
                raise ConfigError(f"{file}: cameras: two cameras are called {name!r}")
            by_name[name] = camera
        tree["cameras"] = by_name
    _resolve_paths(tree, (), file.resolve().parent, file)
    return tree


def _resolve_paths(tree: dict[str, Any], above: tuple[str, ...], base: Path, file: Path) -> None:
    for key, value in tree.items():
        path = (*above, key)
        if isinstance(value, dict):
            _resolve_paths(value, path, base, file)
        elif isinstance(value, str) and _pattern(path) in _PATH_KEYS:
            tree[key] = _absolute(value, base, file, ".".join(path))
    model = tree.get("model") if not above else None
    bundle = model.get("bundle") if isinstance(model, dict) else None
    is_folder = isinstance(bundle, str) and ("/" in bundle or (base / bundle / "bundle.toml").is_file())
    if isinstance(model, dict) and isinstance(bundle, str) and is_folder:
        model["bundle"] = str(base / _at_home(bundle, "model.bundle"))


def _absolute(text: str, base: Path, file: Path | None, where: str) -> str:
    """The path, from `base` where it is relative. `$CREDENTIALS_DIRECTORY/` leads to what systemd hands a service."""
    if text.startswith(CREDENTIALS):
        text = _credentials(file, f"{where}: {text}") + text.removeprefix(CREDENTIALS)
    return str(base / _at_home(text, where))


def _at_home(text: str, where: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # `~pictures/`: no such user
        raise ConfigError(f"{where}: {text}: {error}") from error


def keys_folder(file: Path) -> Path:
    """Where the unit has systemd take the credentials of a station from: `keys/NAME` beside its NAME.toml."""
    return file.absolute().parent / "keys" / file.stem


def _credentials(file: Path | None, where: str) -> str:
    """What systemd says; outside the service, for a command by hand, the folder that it takes them from."""
    if CREDENTIALS[1:] in os.environ:
        return os.environ[CREDENTIALS[1:]]
    unset = f"{where}: {CREDENTIALS[1:]} is not set; systemd sets it for a service, elsewhere"
    if file is None:
        raise ConfigError(f"{unset} set it to the folder that holds the keys")
    folder = keys_folder(file)
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "put them there (`flawline keys` makes CURVE's), or set it to the folder that holds them"
        raise ConfigError(f"{unset} the keys are taken from {folder}, which is not there: {remedy}") from error
    except OSError:
        pass  # it is root's alone: who only checks the file needs no key, and who does is told what cannot be read
    return str(folder)


def _pattern(path: tuple[str, ...]) -> tuple[str, ...]:
    return (path[0], "*", *path[2:]) if path[0] in ("cameras", "recipes") else path


def _assign(
    tree: dict[str, Any], written: list[str], text: str, file: Path | None, source: str, *, any_case: bool
) -> None:
    """Put one value into the tree. Only names that exist are accepted; a camera must be there already."""
    path = [part.lower() for part in written] if any_case else written
    if path[0] == "cameras" and "cameras" not in tree:
        tree["cameras"] = {
            camera.name: camera.model_dump(exclude={"name"}, exclude_unset=True)
            for camera in Settings.model_fields["cameras"].get_default()
        }
    node: dict[str, Any] = tree
    kind: Any = Settings
    for depth, part in enumerate(path):
        known = _keys(kind, node)
        open_ended = (depth == 1 and path[0] == "recipes") or kind is dict
        match = next((key for key in known if key == part or (any_case and key.lower() == part)), None)
        if match is None:
            if not open_ended:
                raise ConfigError(f"{source}: unknown key {'.'.join(path)!r}{_nearest(part, known)}")
            match = written[depth] if depth > 1 else part  # features have a case of their own
        kind = _child(kind, match, depth, path)
        if depth == len(path) - 1:
            if kind is not None and kind is not dict and isinstance(kind, type) and issubclass(kind, BaseModel):
                raise ConfigError(f"{source}: {'.'.join(path)!r} is a table; name a key inside it")
            value: Any = _value(text, source)
            if _pattern((*path[:-1], match)) in _PATH_KEYS and isinstance(value, str):
                value = _absolute(value, Path.cwd(), file, source)
            node[match] = value
        else:
            node = node.setdefault(match, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{source}: {'.'.join(path[: depth + 1])!r} is not a table")


def _keys(kind: Any, node: dict[str, Any]) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return list(node)


def _child(kind: Any, key: str, depth: int, path: list[str]) -> Any:
    """What the key holds: a settings table, `dict` for a free table, or None for a plain value."""
    if depth == 0 and key == "cameras":
        return tuple
    if depth == 1 and path[0] in ("cameras", "recipes"):
        return CameraSettings if path[0] == "cameras" else Recipe
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return None
    annotation = kind.model_fields[key].annotation
    for option in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
        if get_origin(option) is dict:
            return dict
    return None


def _value(text: str, source: str) -> Any:
    """Lists, tables and quoted strings are read as TOML; anything else stays text for pydantic to read."""
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: {text!r} is not a valid TOML value: {error}") from error
    return text


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def explain(error: ValidationError, root: type[BaseModel], where: str, cameras: list[str]) -> str:
    """One line for the first thing that is wrong: where, which key, what, and the nearest known name.

    `cameras` gives the names for the numbers that pydantic counts them by.
    """
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    if len(location) > 1 and location[0] == "cameras" and location[1].isdigit():
        location[1] = cameras[int(location[1])] if int(location[1]) < len(cameras) else location[1]
    data: Any = first.get("input")
    if first["type"] == "extra_forbidden":
        parent = _model_at(root, location[:-1])
        hint = _nearest(location[-1], parent.model_fields) if parent else ""
        message = f"{where}: unknown key {'.'.join(location)!r}{hint}"
    else:
        text = first["msg"].removeprefix("Value error, ")
        shown = (
            "" if isinstance(data, dict | BaseModel) or first["type"] == "missing" else f" (given: {_shortened(data)})"
        )
        key = ".".join(location)
        message = f"{where}: {key}: {text}{shown}" if key else f"{where}: {text}"
    more = error.error_count() - 1
    return message + (f" (and {more} more)" if more else "")


def _shortened(value: Any, most: int = 200) -> str:
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _model_at(root: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    kind: Any = root
    for depth, part in enumerate(location):
        if kind is tuple or (depth == 1 and location[0] in ("cameras", "recipes")):
            kind = _child(Settings, part, 1, location)
        else:
            if not (isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields):
                return None
            kind = _child(kind, part, depth, location)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
