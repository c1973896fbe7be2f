"""The page of all keys, made from the settings themselves: python tests/config/settings_page.py > docs/settings.md"""

import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flawline.config.settings import Settings

HEAD = """# All keys

One TOML file holds everything; `flawline run --config FILE --check` validates it and shows what is in force,
without the keys that are not set (`–` here). Any key can also be given as `--set a.b=value`, or in the
environment as `FLAWLINE_A__B=value`; a camera is called by its name: `FLAWLINE_CAMERAS__TOP__FPS`. Unknown keys
are refused with the nearest known name. Relative paths are relative to the file.

This page is made from the code: `python tests/config/settings_page.py > docs/settings.md`.
"""
BOUNDS = (("ge", "from {}"), ("gt", "above {}"), ("le", "to {}"), ("lt", "below {}"))


def page() -> str:
    """Markdown: a table for each section."""
    return "\n".join([HEAD, *_section("", Settings)])


def _section(name: str, model: type[BaseModel]) -> list[str]:
    rows, below = [], []
    for key, field in model.model_fields.items():
        inner = _model(field.annotation)
        if inner is None:
            rows.append(f"| `{key}` | {_default(field)} | {_values(field)} | {_cell(field.description or '')} |")
            continue
        title = {"cameras": "[[cameras]]", "recipes": "[recipes.NAME]"}.get(key, f"{name}{key}")
        title = title if title.startswith("[") else f"[{title}]"
        below += _section(f"{title.strip('[]')}.", inner) if key in ("cameras", "recipes") else []
        below += [] if key in ("cameras", "recipes") else _section(f"{name}{key}.", inner)
    table = ["| key | default | values | what |", "|---|---|---|---|", *rows, ""] if rows else []
    doc = " ".join((model.__doc__ or "").split()) if name else ""
    head = {"": "## At the top", "cameras.": "## [[cameras]]"}.get(name, f"## [{name.removesuffix('.')}]")
    return [head, "", *([doc, ""] if doc else []), *table, *below]


def _model(annotation: Any) -> type[BaseModel] | None:
    """The table that a key holds, alone, optional, in a list or by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _model(part)
        if found is not None:
            return found
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Path) and field.default_factory is not None:
        return "the user's state folder: `~/.local/state/flawline`; of the service `/var/lib/flawline`"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str | Path):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return f"`{json.dumps(list(value))}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _values(field: FieldInfo) -> str:
    kinds = _kinds(field.annotation)
    limits = {}
    for entry in [field, *_annotated(field.annotation)]:
        for one in getattr(entry, "metadata", [entry]):
            limits |= {key: value for key, _ in BOUNDS if (value := getattr(one, key, None)) is not None}
    said = [words.format(_number(limits[key])) for key, words in BOUNDS if key in limits]
    return _cell(", ".join([*kinds, *said]))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _annotated(annotation: Any) -> list[Any]:
    """What stands in `Annotated` anywhere inside."""
    found = list(getattr(annotation, "__metadata__", ()))
    for part in get_args(annotation):
        found += _annotated(part) if not isinstance(part, str) else []
    return found


def _kinds(annotation: Any) -> list[str]:
    if annotation is type(None):
        return []
    origin = get_origin(annotation)
    if origin is Literal:
        return [" ".join(f'`"{value}"`' if isinstance(value, str) else f"`{value}`" for value in get_args(annotation))]
    if origin is typing.Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if origin in (tuple, list):
        parts = [part for part in get_args(annotation) if part is not Ellipsis]
        inner = _kinds(parts[0]) if parts else []
        count = "" if Ellipsis in get_args(annotation) or origin is list else f"{len(parts)} x "
        return [f"list of {count}{' '.join(inner)}"]
    if origin in (dict, typing.Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return ["table"]
    names = {float: "number", int: "integer", bool: "`true` `false`", str: "text", Path: "path"}
    return [names.get(annotation, str(getattr(annotation, "__name__", annotation)))]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    print(page(), end="")
