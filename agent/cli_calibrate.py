"""`flawline calibrate`: a recipe's threshold from good parts, as pictures or as the last verdicts of a running line."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import tomli_w

from flawline.agent.control import ask
from flawline.agent.progress import WorkProgress
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.memory_versions import stored_sha256
from flawline.config.recipe import Recipe
from flawline.config.recipe_file import update_recipe
from flawline.config.sources import load_settings

SHARE = click.FloatRange(0.0, 1.0, min_open=True, max_open=True)
TARGET_FPR = 0.01
AT_ONCE = 500  # verdicts asked for in one request


@dataclass(frozen=True)
class Scores:
    """Scores of good parts, the bundle that gave them, and the memory, where they were judged by one."""

    scores: list[float]
    bundle: str
    bundle_sha256: str
    memory_sha256: str | None = None


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
@click.option("--dry-run", is_flag=True, help="print the threshold, leave the file as it is")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def calibrate(
    good: Path | None,
    last: int | None,
    endpoint: str,
    server_key: Path | None,
    client_key: Path | None,
    recipe: str,
    file: Path | None,
    target_fpr: float | None,
    confidence: float,
    bundle: str | None,
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find a recipe's threshold from good parts, with an upper bound on the rate of false rejects.

    The bound is the exact binomial one (Clopper-Pearson) for an order statistic; it holds for any distribution
    of scores, if the parts are a fair sample of those to come.
    """
    from flawline.models.calibrate import METHOD, promised, require_enough, samples_needed
    from flawline.models.calibrate import calibrate as find_threshold

    if (good is None) == (last is None):
        raise ConfigError("calibrate: give either --good FOLDER or --last N")
    if (server_key is None) != (client_key is None):
        raise ConfigError("calibrate: --server-key and --client-key go together")
    if good is not None:
        judged_by = recipe_named(file, recipe)
        found_scores = _scores_of_pictures(good, judged_by, file, bundle, device, target_fpr, confidence)
    else:
        assert last is not None
        if target_fpr is not None:
            require_enough(last, target_fpr, confidence, "--last")
        keys = (server_key, client_key) if server_key is not None and client_key is not None else None
        found_scores = scores_of_line(endpoint, recipe, last, keys)
        if target_fpr is not None:
            require_enough(len(found_scores.scores), target_fpr, confidence, "--last")
        elif not found_scores.scores:
            raise ConfigError(f"--last: the line has judged no part by recipe {recipe!r} yet")
        if file is not None and not dry_run:
            _refuse_another_memory(found_scores.memory_sha256, recipe_named(file, recipe), recipe, file)
    if target_fpr is None:
        target_fpr = promised(len(found_scores.scores), TARGET_FPR, confidence)
        if target_fpr > TARGET_FPR:
            count, needed = len(found_scores.scores), samples_needed(TARGET_FPR, confidence)
            few = f"{count} good parts promise no more than {100 * target_fpr:.3g} % false rejects"
            click.echo(f"warning: {few}; {needed} would promise {100 * TARGET_FPR:g} %", err=True)
    found = find_threshold(found_scores.scores, target_fpr, confidence)
    # Of a running line without its file nobody knows by what else it judges.
    judged = None if file is None and good is None else recipe_named(file, recipe)
    calibration = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "count": found.count,
        "rejected": found.rejected,
        "target_fpr": target_fpr,
        "confidence": confidence,
        "false_reject_bound": found.false_reject_bound,
        "method": METHOD,
        "threshold": found.threshold,
        "bundle": found_scores.bundle,
        "bundle_sha256": found_scores.bundle_sha256,
        "recipe_sha256": judged and judged.scale_sha256(),
        "memory_sha256": found_scores.memory_sha256,
    }
    calibration = {key: value for key, value in calibration.items() if value is not None}
    written = file if not dry_run else None
    if written is not None:
        update_recipe(written, recipe, {"threshold": found.threshold, "calibration": calibration})
    if as_json:
        click.echo(json.dumps({"recipe": recipe, **calibration, "written": str(written) if written else None}))
        return
    click.echo(
        f"threshold {found.threshold:.6f} from {found.count} good parts ({found.rejected} of them rejected): with "
        f"confidence {confidence:g}, at most {100 * found.false_reject_bound:.3g} % of good parts will be rejected"
    )
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
    inspector = Inspector.load(bundle or model.bundle, device or model.device, model.precision, recipe)
    scores = []
    with WorkProgress("calibrate") as progress:
        progress.start(len(pictures))
        for picture in pictures:
            scores.append(inspector.inspect(read_rgb(picture)).score)
            progress.step(picture.name)
    opened = inspector.towers.bundle
    memory = stored_sha256(Path(recipe.memory)) if recipe.memory else None
    return Scores(scores, opened.name, opened.sha256, memory)


def scores_of_line(endpoint: str, recipe: str, count: int, keys: tuple[Path, Path] | None) -> Scores:
    """The scores of the newest verdicts of a running agent by this recipe, at most `count`.

    Only completed inspections count, and only those by the recipe's newest version and the newest bundle: older
    scores say nothing of what will come. Raises ConfigError where nobody answers, FlawlineError on a refusal.
    """
    scores: list[float] = []
    version = bundle = sha256 = memory = None
    upper: int | None = None
    try:
        while len(scores) < count and (upper is None or upper >= 1):
            request = {"cmd": "replay", "id": 1, "from_seq": 1, "to_seq": upper, "limit": 1}
            if upper is None:
                upper = int(ask(endpoint, request, keys=keys)["last_seq"])
            lower = max(1, upper - AT_ONCE + 1)
            verdicts, start, done = [], lower, False
            while not done and start <= upper:
                reply = ask(endpoint, {"cmd": "replay", "id": 1, "from_seq": start, "to_seq": upper}, keys=keys)
                verdicts += reply["verdicts"]
                start, done = int(reply["next_seq"]), bool(reply["done"])
            for verdict in reversed(verdicts):
                if verdict["recipe"]["id"] != recipe or verdict["result"] == "error" or verdict["degraded"]:
                    continue
                provenance = verdict["provenance"]
                if version is None:
                    version = verdict["recipe"]["version"]
                    bundle, sha256 = provenance["bundle"], provenance["bundle_sha256"]
                    memory = provenance.get("memory_sha256")
                if (verdict["recipe"]["version"], provenance["bundle_sha256"]) != (version, sha256):
                    return Scores(scores, str(bundle), str(sha256), memory)
                scores.append(float(verdict["score"]))
                if len(scores) == count:
                    break
            upper = lower - 1
    except ValueError as error:
        raise FlawlineError(f"--endpoint {endpoint}: the agent refuses: {error}") from error
    return Scores(scores, str(bundle), str(sha256), memory)


def _refuse_another_memory(judged_by: str | None, content: Recipe, recipe: str, file: Path) -> None:
    """A threshold belongs to the scale of the memory that gave the scores: one by words alone has another."""
    written = stored_sha256(Path(content.memory)) if content.memory else None
    if written != judged_by:
        of_line, of_file = (f"the memory {sha[:12]}" if sha else "no memory" for sha in (judged_by, written))
        raise ConfigError(
            f"--last: the line judges recipe {recipe!r} with {of_line}, {file} has {of_file} there: "
            f"set recipes.{recipe}.memory first, or reload the line"
        )


def recipe_named(file: Path | None, name: str) -> Recipe:
    """A recipe of the file, or of the defaults. Raises ConfigError naming those that there are."""
    recipes = load_settings(file).recipes
    if name not in recipes:
        raise ConfigError(f"--recipe {name}: not in {file or 'the defaults'} (there are: {', '.join(sorted(recipes))})")
    return recipes[name]
