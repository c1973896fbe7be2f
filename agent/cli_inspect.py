"""`flawline inspect`: one-shot judgement of picture files, with overlays, masks and a report."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from pydantic import ValidationError

from flawline import __version__
from flawline.agent.progress import WorkProgress
from flawline.agent.verdict import TIMED
from flawline.camera.folder import list_pictures, read_picture
from flawline.camera.pixels import to_rgb8
from flawline.config.errors import ConfigError, FlawlineError, ImageError
from flawline.config.recipe import Recipe
from flawline.config.sources import chosen_recipe, explain, load_settings
from flawline.models import inspect_report, overlay

THUMBNAIL_EDGE = 480  # px, of the pictures in the HTML page
REPORT = "report.html"
KINDS = ("overlay", "mask")  # of pictures among the results


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--bundle", help="a bundle's name, or its folder [default: the file's, or demo]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="NAME.overlay.png, NAME.mask.png and NAME.json go here, folders mirrored; left out: nothing is written",
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line, for every picture")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    is_flag=False,
    flag_value="",
    help=f"a report page, all in one file [without FILE: {REPORT} in --out, or here]",
)
@click.option("--config", "file", type=click.Path(path_type=Path), help="take recipe and model from this TOML file")
@click.option("--recipe", "name", default="default", show_default=True, help="which recipe")
@click.option("--threshold", type=click.FloatRange(0.0, 1.0), help="instead of the recipe's, or the bundle's")
@click.option("--object", "words", help="the object's name in the prompts, instead of the recipe's")
@click.option("--device", help="auto, cpu, cuda, cuda:N [default: the file's, or auto]")
def inspect(
    paths: tuple[Path, ...],
    bundle: str | None,
    out: Path | None,
    as_json: bool,
    page: Path | None,
    file: Path | None,
    name: str,
    threshold: float | None,
    words: str | None,
    device: str | None,
) -> None:
    """Judge picture files, and all pictures below folders. The exit code is 0 whatever the verdicts."""
    pictures = find_pictures(paths, out)
    settings = load_settings(file)
    recipe = chosen_recipe(settings, name, file)
    given = {"threshold": threshold, "object": words}
    try:
        recipe = Recipe.model_validate(
            recipe.model_dump() | {key: value for key, value in given.items() if value is not None}
        )
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe, "inspect", [])) from error
    if page == Path():
        page = (out or page) / REPORT
    for target in (out, page.parent if page else None):
        _make_folder(target)

    from flawline.models.heap import keep_blocks
    from flawline.models.inspector import Inspector

    keep_blocks()
    model = settings.model
    inspector = Inspector.load(bundle or model.bundle, device or model.device, model.precision, recipe)
    judge = _Judge(inspector, recipe, out, thumbnails=page is not None)
    lines = []
    warned: list[str | None] = [None]  # what was said of one picture is not said again of the next
    with WorkProgress("inspect") as progress:
        progress.start(len(pictures))
        for picture, target in pictures:
            line = judge(picture, target)
            lines.append(line)
            progress.result(json.dumps(line.record) if as_json else _printable(_in_words(line.record)))
            if line.record["warning"] not in warned:
                warned.append(line.record["warning"])
                progress.say(_printable(f"warning: {picture}: {warned[-1]}"))
            progress.step(_printable(picture.name))
    records = [line.record for line in lines]
    if len(records) > 1 or any(path.is_dir() for path in paths):
        for text in inspect_report.summary(records):
            click.echo(text, err=as_json)
    if page is not None:
        facts = {
            "bundle": judge.provenance["bundle"],
            "bundle sha256": judge.provenance["bundle_sha256"],
            "recipe": f"{name}: {recipe.object}",
            "threshold": f"{judge.threshold:g}",
            "flawline": __version__,
        }
        _write(page, inspect_report.page("flawline inspect", facts, lines).encode("utf-8"))


def find_pictures(paths: Sequence[Path], out: Path | None = None) -> list[tuple[Path, Path]]:
    """Every picture with the name of its results below `out`, each name once.

    A folder's pictures are mirrored; names that are the same without their suffix keep it, and what is still
    the same (from two folders) gets its folder's name in front. Results of an earlier call in `out` are no pictures to
    judge. Raises ConfigError for a path that isn't there, and where a result would take the place of a picture.
    """
    found: list[tuple[Path, Path]] = []
    taken: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
        inside = list_pictures(path) if path.is_dir() else [path]
        if out is not None and path.is_dir():
            inside = [picture for picture in inside if not _is_result(picture, out)]
        if not inside:
            raise ConfigError(f"{path}: this folder holds no pictures")
        for picture in inside:
            target = next(name for name in _names(picture, path) if name not in taken)
            taken.add(target)
            found.append((picture, target))
    if out is not None:
        given = {picture.resolve() for picture, _ in found}
        for picture, target in found:
            for kind in KINDS:
                if (result := _result(out / target, kind)).resolve() in given:
                    raise ConfigError(f"--out {out}: the {kind} of {picture} would take the place of {result}")
    return found


def _names(picture: Path, given: Path) -> Iterator[Path]:
    relative = picture.relative_to(given) if given != picture else Path(picture.name)
    above = (given if given != picture else picture.parent).resolve().name
    for name in (relative, Path(above) / relative):
        yield name.with_suffix("")
        yield name
    number = 2
    while True:
        yield relative.with_name(f"{relative.name}-{number}")
        number += 1


class _Judge:
    """Judges one picture after the other and writes what there is to write."""

    def __init__(self, inspector: Any, recipe: Recipe, out: Path | None, *, thumbnails: bool) -> None:
        self._inspector = inspector
        self._out = out
        self._thumbnails = thumbnails
        prepared = inspector.prepare(recipe)
        self.threshold = float(prepared.threshold)
        opened = inspector.towers.bundle
        self.provenance = {
            "agent": __version__,
            "bundle": opened.name,
            "bundle_sha256": opened.sha256,
            "precision": str(inspector.towers.dtype).removeprefix("torch."),
            "recipe_sha256": recipe.sha256(),
            "memory_sha256": prepared.memory.sha256 if prepared.memory is not None else None,
        }

    def __call__(self, path: Path, target: Path) -> inspect_report.Line:
        try:
            pixels, pixel_format = read_picture(path)
            picture = np.empty((*pixels.shape[:2], 3), np.uint8)
            to_rgb8(pixels, pixel_format, picture)
            result = self._inspector.inspect(picture)
        except ImageError as error:
            text = str(error) if str(path) in str(error) else f"{path}: {error}"
            record = self._record(path, result="error", reason="bad_frame", detail=text, score=None, defects=[])
            self._save(target, record, {})
            return inspect_report.Line(record)
        except FlawlineError as error:  # of this picture alone, as far as we know
            detail = f"{path}: {error}"
            record = self._record(path, result="error", reason="internal", detail=detail, score=None, defects=[])
            self._save(target, record, {})
            return inspect_report.Line(record)
        record = self._record(
            path,
            result="pass" if result.passed else "fail",
            reason=None,
            score=result.score,
            defects=result.defects,
            warning=result.warning,
            stage_ms=dict.fromkeys(TIMED, 0.0) | result.stage_ms,
        )
        drawn = overlay.draw(picture, result) if self._out is not None or self._thumbnails else None
        pictures = {}
        if self._out is not None and drawn is not None:
            pictures = {"overlay": overlay.encode(drawn), "mask": overlay.encode(overlay.mask_picture(result))}
        self._save(target, record, pictures)
        if drawn is None or not self._thumbnails:
            return inspect_report.Line(record)
        return inspect_report.Line(record, overlay.encode(overlay.reduced(drawn, THUMBNAIL_EDGE), ".jpg"))

    def _record(self, path: Path, **judgement: Any) -> dict[str, Any]:
        return {
            "path": str(path),
            "degraded": False,
            "threshold": self.threshold,
            "stage_ms": {},
            "warning": None,
            **judgement,
            "provenance": self.provenance,
        }

    def _save(self, target: Path, record: dict[str, Any], pictures: dict[str, bytes]) -> None:
        if self._out is None:
            return
        base = self._out / target
        _make_folder(base.parent)
        for kind in KINDS:
            if kind in pictures:
                _write(_result(base, kind), pictures[kind])
            else:  # of an earlier call, when the picture could be read
                _remove(_result(base, kind))
        _write(base.with_name(f"{base.name}.json"), json.dumps(record, indent=2).encode("utf-8") + b"\n")


def _in_words(record: dict[str, Any]) -> str:
    if record["result"] == "error":
        return f"error {record['reason']}: {record['detail']}"
    score, threshold, defects = record["score"], record["threshold"], len(record["defects"])
    found = f"{defects} defect{'' if defects == 1 else 's'}"
    return f"{record['result']}  score {score:.4f} (threshold {threshold:g})  {found}  {record['path']}"


def _printable(text: str) -> str:
    """A file's name may hold bytes that are no text."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _make_folder(folder: Path | None) -> None:
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror or error}") from error


def _is_result(picture: Path, out: Path) -> bool:
    """Whether it is an overlay or a mask below `out` that an earlier call wrote: its record lies beside it."""
    name, _, kind = picture.stem.rpartition(".")
    if kind not in KINDS or not picture.resolve().is_relative_to(out.resolve()):
        return False
    try:
        record = json.loads(picture.with_name(f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and "provenance" in record


def _result(base: Path, kind: str) -> Path:
    return base.with_name(f"{base.name}.{kind}.png")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be removed: {error.strerror or error}") from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
