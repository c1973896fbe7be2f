"""`flawline calibrate`: a recipe's threshold from good parts, as pictures or as the last verdicts of a running line."""

import json
from datetime import UTC, datetime
from pathlib import Path

import click
import tomli_w

from flawline.agent.line_scores import Line, Scores
from flawline.agent.progress import WorkProgress
from flawline.config.errors import ConfigError
from flawline.config.memory_versions import stored_sha256
from flawline.config.recipe import Recipe
from flawline.config.recipe_file import update_recipe
from flawline.config.sources import chosen_recipe, load_settings

SHARE = click.FloatRange(0.0, 1.0, min_open=True, max_open=True)
TARGET_FPR = 0.01
MOST_KEYS = 3  # named where recipes differ


@click.command()
@click.option("--good", type=click.Path(path_type=Path, file_okay=False), help="pictures of good parts")
@click.option(
    "--last", type=click.IntRange(min=1), help="instead: the last so many verdicts of a running line, all good parts"
)
@click.option(
    "--endpoint", default="tcp://127.0.0.1:5556", show_default=True, help="--last: where the agent takes commands"
)
@click.option(
    "--server-key", type=click.Path(path_type=Path), help="--last: the server's public key, where it demands CURVE"
)
@click.option("--client-key", type=click.Path(path_type=Path), help="--last: this client's secret key")
@click.option("--camera", help="--last: of this camera alone [default: of all that the same version judges]")
@click.option("--recipe", default="default", show_default=True, help="whose threshold")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="the TOML file; the threshold is written into it"
)
@click.option(
    "--target-fpr",
    type=SHARE,
    help=f"highest allowed share of good parts rejected [default: {TARGET_FPR}, or what so few parts can promise]",
)
@click.option("--confidence", type=SHARE, default=0.95, show_default=True, help="probability that this holds")
@click.option("--bundle", help="--good: a bundle's name, or its folder [default: the file's, or demo]")
@click.option("--device", help="--good: auto, cpu, cuda, cuda:N [default: the file's, or auto]")
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    help="--good: as the line judges [default: the file's, or auto]",
)
@click.option("--dry-run", is_flag=True, help="print the threshold, leave the file as it is")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def calibrate(
    good: Path | None,
    last: int | None,
    endpoint: str,
    server_key: Path | None,
    client_key: Path | None,
    camera: str | None,
    recipe: str,
    file: Path | None,
    target_fpr: float | None,
    confidence: float,
    bundle: str | None,
    device: str | None,
    precision: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find a recipe's threshold from good parts, with an upper bound on the rate of false rejects.

    The bound is the exact binomial one (Clopper-Pearson) for an order statistic; it holds for any distribution
    of scores, if the parts are a fair sample of those to come.
    """
    from flawline.models.calibrate import METHOD, promised, samples_needed
    from flawline.models.calibrate import calibrate as find_threshold

    if (good is None) == (last is None):
        raise ConfigError("calibrate: give either --good FOLDER or --last N")
    if (server_key is None) != (client_key is None):
        raise ConfigError("calibrate: --server-key and --client-key go together")
    if camera is not None and last is None:
        raise ConfigError("--camera: belongs to --last; pictures have none")
    if good is not None:
        judged_by = recipe_named(file, recipe)
        found_scores = _scores_of_pictures(good, judged_by, file, bundle, device, precision, target_fpr, confidence)
    else:
        assert last is not None
        keys = (server_key, client_key) if server_key is not None and client_key is not None else None
        found_scores = _scores_of_line(Line(endpoint, keys), recipe, last, camera, target_fpr, confidence)
        if file is not None and not dry_run:
            of_file = recipe_named(file, recipe)
            _refuse_another_memory(found_scores.memory_sha256, of_file, recipe, file)
            _refuse_another_scale(found_scores.recipe, of_file, recipe, file)
    without_score = found_scores.without_score
    if target_fpr is None:
        count, needed = len(found_scores.scores), samples_needed(TARGET_FPR, confidence)
        target_fpr = promised(count, TARGET_FPR, confidence, without_score)
        if target_fpr > TARGET_FPR:
            few = f"{count} good parts promise no more than {100 * target_fpr:.3g} % false rejects"
            more = f"; {needed} would promise {100 * TARGET_FPR:g} %" if count < needed else ""
            click.echo(f"warning: {few}{more}", err=True)
    option = "--good" if good is not None else "--last"
    found = find_threshold(found_scores.scores, target_fpr, confidence, option)
    calibration = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "count": found.count,
        "rejected": found.rejected,
        "target_fpr": target_fpr,
        "confidence": confidence,
        "false_reject_bound": found.false_reject_bound,
        "method": METHOD + (f"; {without_score} of the parts without a score, taken as rejects" * (without_score > 0)),
        "threshold": found.threshold,
        "bundle": found_scores.bundle,
        "bundle_sha256": found_scores.bundle_sha256,
        "recipe_sha256": found_scores.recipe.scale_sha256(),
        "memory_sha256": found_scores.memory_sha256,
        "min_defect_area_px": found_scores.recipe.min_defect_area_px,
        "precision": found_scores.precision,
    }
    calibration = {key: value for key, value in calibration.items() if value is not None}
    written = file if not dry_run else None
    if written is not None:
        update_recipe(written, recipe, {"threshold": found.threshold, "calibration": calibration})
    if as_json:
        content = {"recipe": recipe, **calibration, "written": str(written) if written else None}
        if found_scores.version is not None:
            content |= {"recipe_version": found_scores.version, "cameras": found_scores.cameras}
            content["without_score"] = without_score
        click.echo(json.dumps(content))
        return
    click.echo(
        f"threshold {found.threshold:.6f} from {found.count} good parts ({found.rejected} of them rejected): with "
        f"confidence {confidence:g}, at most {100 * found.false_reject_bound:.3g} % of good parts will be rejected"
    )
    if without_score:
        click.echo(f"{without_score} of them have no score and are taken as rejects")
    if found_scores.version is not None:
        click.echo(f"judged by version {found_scores.version} of the recipe, camera {', '.join(found_scores.cameras)}")
    if written is not None:
        click.echo(f"written to recipes.{recipe} in {written}")
    else:
        table = {"recipes": {recipe: {"threshold": found.threshold, "calibration": calibration}}}
        click.echo(tomli_w.dumps(table), nl=False)


def _scores_of_pictures(
    good: Path,
    recipe: Recipe,
    file: Path | None,
    bundle: str | None,
    device: str | None,
    precision: str | None,
    target_fpr: float | None,
    confidence: float,
) -> Scores:
    from flawline.models.calibrate import require_enough
    from flawline.models.datasets import good_pictures
    from flawline.models.ground_truth import read_rgb

    pictures = good_pictures(good)
    if target_fpr is not None:
        require_enough(len(pictures), target_fpr, confidence, "--good")
    from flawline.models.inspector import Inspector  # loads torch; what is refused is refused before

    model = load_settings(file).model
    inspector = Inspector.load(bundle or model.bundle, device or model.device, precision or model.precision, recipe)
    scores = []
    with WorkProgress("calibrate") as progress:
        progress.start(len(pictures))
        for picture in pictures:
            scores.append(inspector.inspect(read_rgb(picture)).score)
            progress.step(picture.name)
    opened = inspector.towers.bundle
    memory = stored_sha256(Path(recipe.memory)) if recipe.memory else None
    return Scores(scores, opened.name, opened.sha256, recipe, memory, inspector.towers.precision)


def _scores_of_line(
    line: Line, recipe: str, last: int, camera: str | None, target_fpr: float | None, confidence: float
) -> Scores:
    from flawline.models.calibrate import allowed_rejects, clopper_pearson_upper, require_enough

    if target_fpr is not None:
        require_enough(last, target_fpr, confidence, "--last")
    found = line.scores(recipe, last, camera)
    count, without = len(found.scores), found.without_score
    if target_fpr is not None:
        require_enough(count, target_fpr, confidence, "--last")
    if found.passed_over:
        click.echo(
            f"warning: verdicts of {', '.join(found.passed_over)} by another version of recipe {recipe!r}, "
            f"another bundle, memory or precision do not count: the newest verdict is by version {found.version}; "
            "--camera NAME chooses",
            err=True,
        )
    if without:
        what = f"{without} of the last {count} parts have no score (SAM did not fit into the deadline, or nothing did)"
        remedy = f"give recipe {recipe!r} a longer deadline_ms or none, and let the line judge good parts again"
        if without == count:
            raise ConfigError(f"--last: {what}: {remedy}")
        if target_fpr is not None and without > (allowed := allowed_rejects(count, target_fpr, confidence)):
            raise ConfigError(
                f"--last: {what}: taken as rejects they are more than the {allowed} that a false reject rate of at "
                f"most {target_fpr:g} allows (at most {clopper_pearson_upper(without, count, confidence):.3g} can "
                f"be promised): {remedy}"
            )
        click.echo(f"warning: {what} and are taken as rejects: {remedy}", err=True)
    return found


def _refuse_another_memory(judged_by: str | None, content: Recipe, recipe: str, file: Path) -> None:
    """A threshold belongs to the scale of the memory that gave the scores: one by words alone has another."""
    written = stored_sha256(Path(content.memory)) if content.memory else None
    if written != judged_by:
        of_line, of_file = (f"the memory {sha[:12]}" if sha else "no memory" for sha in (judged_by, written))
        raise ConfigError(
            f"--last: the line judges recipe {recipe!r} with {of_line}, {file} has {of_file} there: "
            f"set recipes.{recipe}.memory first, or reload the line"
        )


def _refuse_another_scale(judged_by: Recipe, content: Recipe, recipe: str, file: Path) -> None:
    """Nor does it say anything of other words, regions or another way of judging than those that gave the scores."""
    keys = judged_by.scale_differs(content)
    if content.min_defect_area_px < judged_by.min_defect_area_px:  # the other way round scores only fall
        keys.append("min_defect_area_px")
    if keys:
        named = ", ".join(keys[:MOST_KEYS]) + (f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else "")
        raise ConfigError(
            f"--last: the line judged by another recipe {recipe!r} than {file} has, the difference is in {named}: "
            f"reload the line and let it judge good parts again, or write into the file what the line judges by"
        )


def recipe_named(file: Path | None, name: str) -> Recipe:
    """A recipe of the file, or of the defaults. Raises ConfigError naming those that there are."""
    return chosen_recipe(load_settings(file), name, file)
