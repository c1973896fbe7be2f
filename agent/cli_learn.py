"""`flawline learn`: the memory of a recipe from pictures of good parts, its versions, and the way back."""

import json
from pathlib import Path
from typing import Any

import click

from flawline.agent.cli_teach import finish
from flawline.agent.progress import WorkProgress
from flawline.agent.teaching import teach_from_feedback
from flawline.config.errors import ConfigError, ImageError
from flawline.config.memory_versions import FOLDER, activate, next_file, roll_back, stored_sha256
from flawline.config.settings import Settings
from flawline.config.sources import chosen_recipe, load_settings
from flawline.models.good_parts import FEW_GOOD_PARTS, MOST_GOOD_PARTS


@click.command()
@click.option("--recipe", default="default", show_default=True, help="whose memory")
@click.option(
    "--good",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"pictures of good parts, 1 to {MOST_GOOD_PARTS}",
)
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="the TOML file; the memory's name is written into it"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="where the memory goes [default: a new version in memory/ beside the TOML file, or in the journal's folder]",
)
@click.option("--keep-all", is_flag=True, help="learn from outliers too: they are good, only rare")
@click.option(
    "--from-feedback",
    is_flag=True,
    help="instead of --good: from rejects that operators marked as wrong; shows what changes",
)
@click.option(
    "--activate",
    "go",
    is_flag=True,
    help="--from-feedback: judge by it [default: asked at a terminal, else only shown]",
)
@click.option("--force", is_flag=True, help="--from-feedback: activate although confirmed defects would pass")
@click.option(
    "--compare",
    type=click.IntRange(min=0),
    default=500,
    show_default=True,
    help="--from-feedback: of archived parts without a mark, judge the newest so many by both memories",
)
@click.option("--rollback", is_flag=True, help="learn nothing: go back to the version before, or to none")
@click.option("--bundle", help="a bundle's name, or its folder [default: the file's, or demo]")
@click.option("--device", help="auto, cpu, cuda, cuda:N [default: the file's, or auto]")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), help="[default: the file's, or auto]")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def learn(
    recipe: str,
    good: Path | None,
    file: Path | None,
    out: Path | None,
    keep_all: bool,
    from_feedback: bool,
    go: bool,
    force: bool,
    compare: int,
    rollback: bool,
    bundle: str | None,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> None:
    """Learn what good parts look like, from a few pictures of them or from rejects that were wrong.

    From then on the recipe judges by words and memory together. The same pictures give the same memory; every
    verdict names its hash. A defective part among the good ones is shown and left out.
    """
    settings = load_settings(file)
    rules = chosen_recipe(settings, recipe, file)
    if rollback:
        if good is not None or out is not None or from_feedback:
            raise ConfigError("--rollback: learns nothing, so without --good, --from-feedback and --out")
        _roll_back(settings, recipe, file)
        return
    place = (file.resolve().parent if file is not None else settings.journal.path) / FOLDER
    if from_feedback:
        if good is not None or out is not None:
            raise ConfigError("--from-feedback: takes its pictures from the archive, without --good and --out")
        if go and file is None:
            raise ConfigError("--activate: name the TOML file with --config; its recipe names the memory in use")
        report = teach_from_feedback(
            settings,
            recipe,
            place,
            keep_all=keep_all,
            compare=compare,
            bundle=bundle,
            device=device,
            precision=precision,
        )
        finish(report, recipe, rules, file, go=go, force=force, as_json=as_json)
        return
    if go or force:
        raise ConfigError("--activate, --force: belong to --from-feedback; --good activates by itself")
    if good is None:
        raise ConfigError("--good: name the folder with pictures of good parts (or give --from-feedback, --rollback)")
    learnt = _learn(settings, recipe, good, keep_all, bundle, device, precision)
    memory = learnt.memory
    from flawline.models.memory_file import write_memory

    if out is not None:
        _refuse_to_overwrite(out, memory.sha256)
    path = out if out is not None else next_file(place, recipe, memory.sha256)
    write_memory(path, memory)
    if file is not None:
        activate(file, recipe, path, rules.memory)
    notes = []
    if memory.about.pictures == 1:
        notes.append("one picture cannot say how good parts differ: the bundle's own scale is used; give a few more")
    elif len(learnt.pictures) < FEW_GOOD_PARTS:
        notes.append(f"fewer than {FEW_GOOD_PARTS} pictures: a defective one among them cannot be told")
    if memory.about.pictures > 1 and memory.about.place == 0.0:
        lie = "the good parts do not lie alike, so something right in the wrong place is not found"
        remedy = f"if they only shift in the frame, write memory_registration = true into recipes.{recipe}"
        notes.append(f"{lie}, even laid over one another" if memory.about.registered else f"{lie}; {remedy}")
    if learnt.by_words and rules.memory_share < 1.0:
        notes.append(
            f"by words alone {learnt.by_words} of these good parts reach the threshold: if some are rejected, give "
            f"the words less say (recipes.{recipe}.memory_share, now {rules.memory_share:g}; 1 is the memory alone)"
        )
    if rules.calibration is not None:
        notes.append("the recipe's threshold was calibrated without this memory: run `flawline calibrate` again")
    if as_json:
        content = {
            "recipe": recipe,
            "memory": str(path),
            "memory_sha256": memory.sha256,
            "written": str(file) if file else None,
            "pictures": [
                {"name": one.name, "use": one.use, "distance": one.distance, "typical": one.typical}
                for one in learnt.pictures
            ],
            "notes": notes,
            "about": memory.about.model_dump(mode="json"),
        }
        click.echo(json.dumps(content))
        return
    for one in learnt.pictures:
        if one.use == "outlier":
            numbers = f"distance {one.distance:.3f}, typical {one.typical:.3f}"
            click.echo(f"left out, unlike the other good parts: {one.name} ({numbers})")
        elif one.use == "duplicate":
            click.echo(f"left out, the same picture again: {one.name}")
    click.echo(f"learnt {memory.about.pictures} good parts: {path}, sha256 {memory.sha256}")
    for note in notes:
        click.echo(f"note: {note}")
    if file is not None:
        click.echo(f"written to recipes.{recipe} in {file}; `flawline learn --rollback` takes it back")
    else:
        click.echo(f"[recipes.{recipe}]\nmemory = {json.dumps(str(path.resolve()))}")


def _refuse_to_overwrite(out: Path, sha256: str) -> None:
    """A memory may be in use under this name: its recipe would not change with its content, and no way lead back."""
    if not out.exists():
        return
    try:
        there = stored_sha256(out)
    except ConfigError as error:
        raise ConfigError(f"--out {out}: is there already, and no memory; nothing is overwritten: {error}") from error
    if there != sha256:
        raise ConfigError(
            f"--out {out}: holds another memory ({there[:12]}, learnt was {sha256[:12]}), which may be in use; give "
            "another name, or leave --out away: then each memory gets a number"
        )


def _learn(
    settings: Settings,
    recipe: str,
    good: Path,
    keep_all: bool,
    bundle: str | None,
    device: str | None,
    precision: str | None,
) -> Any:
    from flawline.camera.folder import read_picture
    from flawline.models.datasets import good_pictures
    from flawline.models.ground_truth import read_rgb

    pictures = good_pictures(good)
    model = settings.model
    from flawline.models.inspector import Inspector
    from flawline.models.memory_learn import Learner

    if len(pictures) > MOST_GOOD_PARTS:
        raise ConfigError(f"--good {good}: holds {len(pictures)} pictures; a memory takes at most {MOST_GOOD_PARTS}")
    rules = settings.recipes[recipe].model_copy(update={"memory": None})
    inspector = Inspector.load(bundle or model.bundle, device or model.device, precision or model.precision, rules)
    learner = Learner(inspector, recipe, rules)
    first = ""
    with WorkProgress("learn") as progress:
        progress.start(len(pictures))
        for picture in pictures:
            name = str(picture.relative_to(good))
            _, pixel_format = read_picture(picture)
            first = first or pixel_format
            if pixel_format != first:
                raise ImageError(f"{picture}: is {pixel_format}, the pictures before it {first}")
            try:
                learner.add(read_rgb(picture), name)
            except ImageError as error:
                raise ImageError(f"{good / name}: {str(error).removeprefix(f'{name}: ')}") from error
            progress.step(name)
    return learner.learn(keep_all=keep_all)


def _roll_back(settings: Settings, recipe: str, file: Path | None) -> None:
    if file is None:
        raise ConfigError("--rollback: name the TOML file with --config; its recipe names the memory in use")
    current = settings.recipes[recipe].memory
    if current is None:
        raise ConfigError(f"{file}: recipes.{recipe} has no memory to go back from")
    previous = roll_back(file, recipe, Path(current))
    click.echo(
        f"recipes.{recipe} in {file}: "
        + (f"back to {previous}" if previous is not None else "there is no earlier memory; words alone judge again")
    )
