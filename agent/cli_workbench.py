"""The workbench on the command line: evaluate and train-adapter. Torch is loaded only when one runs."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import rich.console
import rich.table

from flawline import __version__
from flawline.agent.cli_calibrate import calibrate, recipe_named
from flawline.agent.progress import WorkProgress
from flawline.agent.progress_bytes import megabytes
from flawline.agent.set_options import FOLDER, KIND, split
from flawline.config.errors import BundleError, ConfigError
from flawline.config.sources import load_settings
from flawline.models.good_parts import MOST_GOOD_PARTS


def _size(_context: click.Context, _option: click.Parameter, value: str) -> int | None:
    if value == "native":
        return None
    if not value.isdigit() or not 32 <= int(value) <= 4096:
        raise click.BadParameter("give an edge from 32 to 4096 px, or `native`")
    return int(value)


def _numbers(_context: click.Context, _option: click.Parameter, value: str | None) -> list[int]:
    texts = value.split(",") if value else []
    if not all(text.strip().isdigit() and int(text) <= MOST_GOOD_PARTS for text in texts):
        raise click.BadParameter(f"give numbers of good parts from 0 to {MOST_GOOD_PARTS}, as 0,1,2,4,8,16")
    return sorted({int(text) for text in texts})


@click.command()
@click.option("--dataset", "kind", type=KIND, required=True, help="how the folder is laid out")
@click.option("--root", type=FOLDER, required=True, help="the data set's folder")
@click.option("--category", "named", multiple=True, callback=split, help="only these classes", metavar="C ...")
@click.argument("more", nargs=-1, metavar="[C ...]")
@click.option("--bundle", help="a bundle's name, or its folder [default: the file's, or demo]")
@click.option(
    "--adapter", type=click.Path(path_type=Path, dir_okay=False), help="linear layers instead of the bundle's"
)
@click.option("--device", help="auto, cpu, cuda, cuda:N [default: the file's, or auto]")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), help="[default: the file's, or auto]")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="take a recipe and the model from this TOML file"
)
@click.option("--recipe", default="default", show_default=True, help="which one")
@click.option("--object", "words", help="the object's name in the prompts [default: the class's name]")
@click.option(
    "--region-threshold",
    type=click.FloatRange(0.0, 1.0),
    help="S_a begins here [default: the recipe's, or the bundle's]",
)
@click.option("--ablation", "ablations", multiple=True, callback=split, help="table2 (dilation), table3 (cascade)")
@click.option(
    "--methods",
    multiple=True,
    is_flag=False,
    flag_value="all",
    callback=split,
    help="other methods beside: all, or windows, clip, sdp, sdp_plus, anomalyclip, boxes, contrast, blur",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="METHOD=BUNDLE[,FILE]",
    help="run sdp, sdp_plus or anomalyclip with this bundle's CLIP and their released checkpoint",
)
@click.option(
    "--shots",
    callback=_numbers,
    metavar="N,N...",
    help="also with so many good parts of train/good in memory: 0,1,2,4,8,16",
)
@click.option(
    "--seeds",
    "draws",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="draws of good parts for --shots",
)
@click.option("--size", default="518", callback=_size, show_default=True, help="frame of the metrics: px, or native")
@click.option("--limit", type=click.IntRange(min=1), help="at most so many good and so many defective pictures a class")
@click.option("--tolerate", is_flag=True, help="pictures without a fitting mask count in image metrics only")
@click.option("--keep-maps", is_flag=True, help="leave the raw float32 maps in OUT/.work")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--shards", type=click.IntRange(min=1), default=2, show_default=True, help="processes of --engine ray")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the bootstrap, and of the first draw"
)
@click.option("--out", type=FOLDER, required=True, help="where results.json, results.md and plots go")
def evaluate(
    kind: Any,
    root: Path,
    named: list[str],
    more: tuple[str, ...],
    bundle: str | None,
    adapter: Path | None,
    device: str | None,
    precision: str | None,
    file: Path | None,
    recipe: str,
    words: str | None,
    region_threshold: float | None,
    ablations: list[str],
    methods: list[str],
    peers: tuple[str, ...],
    shots: list[int],
    draws: int,
    size: int | None,
    limit: int | None,
    tolerate: bool,
    keep_maps: bool,
    engine: str,
    shards: int,
    seed: int,
    out: Path,
) -> None:
    """Measure a bundle on a data set: table, results.json, results.md, plots.

    Interrupted, the same command goes on where it was.
    """
    from flawline.models import datasets, results_report, study
    from flawline.models import evaluate as evaluation

    ablations += [word for word in more if word in study.ABLATIONS]  # `--ablation table2 table3`
    more = tuple(word for word in more if word not in study.ABLATIONS)
    if more and not named:
        raise ConfigError(f"unexpected argument {more[0]!r}: classes are named by --category")
    categories = datasets.read_dataset(kind, root, [*named, *more], tolerate=tolerate)
    if limit is not None:
        categories = [evaluation.subset(category, limit) for category in categories]
    specs = _peer_specs(peers)
    rows = study.rows_of(ablations, [*methods, *(spec.method for spec in specs)])
    base = recipe_named(file, recipe)
    if region_threshold is not None:
        cut = base.prompt.model_copy(update={"region": "absolute", "region_threshold": region_threshold})
        base = base.model_copy(update={"prompt": cut})
    # A memory was learnt with the recipe's words, which it then goes on with.
    words = words or (base.object if base.memory or "object" in base.model_fields_set else None)
    model = load_settings(file).model
    bundle, device, precision = bundle or model.bundle, device or model.device, precision or model.precision
    recipes = {
        category.name: base.model_copy(update={"object": words or datasets.object_words(kind, category.name)})
        for category in categories
    }
    console = rich.console.Console(stderr=True)
    with console.status("loading the models") if console.is_terminal else nullcontext():
        inspector, loaded = _load_models(bundle, device, precision, adapter, specs, kind)
    towers = inspector.towers
    running, left_out = _rows_that_run(rows, inspector, base, loaded)
    own = [towers.bundle.sha256, _digest(adapter), str(towers.dtype), towers.device.type, __version__]
    identity = json.dumps([*own, *(spec.identity() for spec in specs)])
    plan = evaluation.Plan(categories, running, recipes, size, out, identity, seed)

    cluster: Any = None
    if engine == "ray":
        from flawline.models.ray_engine import RayCluster

        cluster = RayCluster(towers.bundle.folder, adapter, device, precision, shards, specs, kind)

    def judge_for(category: datasets.Category) -> Any:
        recipe = recipes[category.name]
        if cluster is not None:
            return cluster.judge(running, recipe, size)
        from flawline.models.row_maps import RowMaps

        maps = RowMaps(inspector, running, recipe, size, loaded)
        return lambda samples: evaluation.judge_locally(maps, samples, recipe.min_defect_area_px)

    started = datetime.now(UTC)
    few: dict[str, Any] = {}
    if shots:
        from flawline.models.shots import ShotStudy

        with WorkProgress("shots") as progress, evaluation.writing(out):
            work = evaluation.work_folder(out)
            few = ShotStudy(inspector, recipes, shots, draws, seed, progress, work, identity).run(categories)
    with WorkProgress("evaluate") as progress, cluster or nullcontext():
        run = evaluation.Evaluation(plan, judge_for, progress)
        reports = run.run(keep_maps=keep_maps)
        settings = {
            "dataset": kind,
            "root": str(root),
            "categories": [category.name for category in categories],
            "size": size,
            "limit": limit,
            **_about_models(inspector, adapter, base),
            "peers": list(peers),
            "recipe": base.model_dump(mode="json"),
            "objects": {name: one.object for name, one in recipes.items()},
            "engine": engine,
            "seed": seed,
            "version": __version__,
            "date": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
            "problems": [_printable(problem) for category in categories for problem in category.problems],
            "without_masks": [category.name for category in categories if not category.with_masks],
        }
        content = results_report.results(settings, rows, reports, left_out)
        if shots:
            content["shots"] = few
        with evaluation.writing(out):
            results_report.write_results(out, content)
            agents = {name: report[study.AGENT.key] for name, report in reports.items()}
            _plots(out, agents, few if shots else None)
        for problem in settings["problems"]:
            progress.say(f"problem: {problem}")
        for name in settings["without_masks"]:
            progress.say(f"{name}: no masks, so there are image metrics only")
    if not keep_maps:
        run.clean_up()
    _show(results_report.CLASS_HEADINGS, results_report.class_lines(content))
    if len(rows) > 1:
        _show(*results_report.row_table(content))
        for note in results_report.row_notes(content):
            click.echo(note)
    if shots:
        _show(results_report.SHOT_HEADINGS, results_report.shot_lines(few))
    click.echo(f"{out / 'results.json'}, {out / 'results.md'}, {out / 'plots'}")


def _load_models(
    bundle: str, device: str, precision: str, adapter: Path | None, specs: list[Any], kind: str
) -> tuple[Any, dict[str, Any]]:
    """The inspector, with the layers of `--adapter`, and the peers by their method."""
    from flawline.models.adapter_file import with_adapter
    from flawline.models.heap import keep_blocks
    from flawline.models.inspector import Inspector
    from flawline.models.peers import load_peers

    keep_blocks()
    inspector = Inspector.load(bundle, device=device, precision=precision)
    if adapter is not None:
        inspector = Inspector(with_adapter(inspector.towers, adapter))
    return inspector, load_peers(specs, inspector.towers.device, kind)


def _rows_that_run(
    rows: Sequence[Any], inspector: Any, base: Any, loaded: dict[str, Any]
) -> tuple[list[Any], dict[str, str]]:
    """Those rows, and of each other one why it is left out. Raises what the agent's own row is refused for."""
    from flawline.models.study import AGENT

    running, left_out = [], {}
    for row in rows:
        if row.source is None:
            continue
        if row.source == "peer" and row.key not in loaded:
            left_out[row.key] = f"its models are its own; give them by --peer {row.key}=..."
            continue
        try:
            inspector.prepare(row.recipe(base))
        except (BundleError, ConfigError) as error:
            if row is AGENT:
                raise
            left_out[row.key] = str(error)
        else:
            running.append(row)
    return running, left_out


def _about_models(inspector: Any, adapter: Path | None, recipe: Any) -> dict[str, Any]:
    """What judged, for results.json."""
    towers = inspector.towers
    manifest = towers.bundle.manifest
    return {
        "bundle": towers.bundle.name,
        "bundle_sha256": towers.bundle.sha256,
        "adapter": str(adapter) if adapter else None,
        "adapter_sha256": _digest(adapter) or _own_layers(towers.bundle),
        "activation": towers.clip.activation,
        "device": str(towers.device),
        "precision": str(towers.dtype).removeprefix("torch."),
        "localiser": towers.localiser_of(recipe),
        "region_threshold": inspector.prepare(recipe).region_threshold,
        "region_threshold_stated": recipe.prompt.region_threshold is not None or manifest.states_thresholds,
    }


def _printable(problem: object) -> str:
    """A file's name may be any bytes."""
    return str(problem).encode("utf-8", "backslashreplace").decode()


def _peer_specs(texts: Sequence[str]) -> list[Any]:
    if not texts:
        return []  # torch is not imported only to see that there is nothing to read
    from flawline.models.peers import PeerSpec

    return [PeerSpec.parse(text) for text in texts]


def _plots(out: Path, reports: dict[str, Any], shots: dict[str, Any] | None) -> None:
    from flawline.models.plots import write_plots, write_shot_curves

    write_plots(out / "plots", reports)
    if shots is not None:
        write_shot_curves(out / "plots", shots)


def _show(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = rich.table.Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = rich.console.Console()
    # elsewhere than on a terminal nothing is cut off to fit a width that nobody has
    (console if console.is_terminal else rich.console.Console(width=200)).print(table)


@click.command("train-adapter")
@click.option("--dataset", "kind", type=KIND, required=True, help="how the folder is laid out")
@click.option("--root", type=FOLDER, required=True, help="the data set's folder; its test split is trained on")
@click.option("--category", "named", multiple=True, callback=split, help="only these classes", metavar="C ...")
@click.argument("more", nargs=-1, metavar="[C ...]")
@click.option("--bundle", default="demo", show_default=True, help="whose CLIP: a bundle's name, or its folder")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--epochs", type=click.IntRange(min=1), help="[default: 3 on mvtec, else 15]")
@click.option("--batch", type=click.IntRange(min=2), help="[default: 16; the published script has 8]")
@click.option("--lr", "learning_rate", type=click.FloatRange(0.0, min_open=True), help="[default: 0.001]")
@click.option(
    "--mosaic", type=click.FloatRange(0.0, 1.0), help="share of 2 x 2 mosaics [default: 0.2 on mvtec, else 0]"
)
@click.option("--seed", type=click.IntRange(min=0), help="[default: 111]")
@click.option("--tolerate", is_flag=True, help="leave out pictures without a fitting mask")
@click.option("--cache", type=FOLDER, help="folder of CLIP's features [default: the user's cache]")
@click.option("--no-cache", is_flag=True, help="compute the features anew in every epoch")
@click.option("--keep-cache", is_flag=True, help="leave the features there when the layers are written")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="FILE; by its suffix ours (.safetensors, or any) or APRIL-GAN's (.pth), the other beside it",
)
def train_adapter(
    kind: Any,
    root: Path,
    named: list[str],
    more: tuple[str, ...],
    bundle: str,
    device: str,
    tolerate: bool,
    cache: Path | None,
    no_cache: bool,
    keep_cache: bool,
    out: Path,
    **given: Any,
) -> None:
    """Train CLIP's linear layers on a data set with masks.

    Interrupted, the same command goes on from FILE.state.
    """
    if more and not named:
        raise ConfigError(f"unexpected argument {more[0]!r}: classes are named by --category")
    from flawline.models import datasets

    categories = datasets.read_dataset(kind, root, [*named, *more], tolerate=tolerate)
    from flawline.models.adapter_training import AdapterTrainer, TrainingPlan, refuse_to_overwrite
    from flawline.models.bundle import open_bundle
    from flawline.models.feature_cache import default_folder
    from flawline.models.towers import choose_device

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    beside = {".safetensors": out.with_suffix(".pth"), ".pth": out.with_suffix(".safetensors")}
    other = beside.get(out.suffix, out.with_name(f"{out.name}.pth"))
    safetensors, april_gan = (other, out) if out.suffix == ".pth" else (out, other)
    refuse_to_overwrite(out, (safetensors, april_gan))
    plan = TrainingPlan.of(kind, **given)
    opened = open_bundle(bundle)
    opened.verify()
    features = None if no_cache else cache or default_folder()
    trainer = AdapterTrainer(opened, kind, categories, plan, choose_device(device), features)
    state = out.with_name(f"{out.name}.state")
    with WorkProgress("train-adapter") as progress:
        done = trainer.resume(state)
        progress.start(plan.epochs * trainer.steps_per_epoch, trainer.done)
        if done is False and state.exists():
            progress.say(f"{state} belongs to another run and will be replaced")
        left_out = sum(len(category.test) for category in categories) - len(trainer.samples)
        if left_out:
            progress.say(f"{left_out} pictures without a fitting mask are left out")
        pictures = [sample.image for _, sample in trainer.samples]
        if features is not None:
            progress.say(_about_cache(features, trainer.features, pictures))

        def report(step: Any) -> None:
            progress.step(f"epoch {step.epoch} of {plan.epochs}, loss {step.loss:.4f}")

        try:
            trainer.train(report, lambda: trainer.save_state(state))
        except KeyboardInterrupt:
            trainer.save_state(state)
            kept = "" if features is None else f"; CLIP's features stay in {features} until then"
            progress.say(f"interrupted; the same command goes on from {state}{kept}")
            raise
    trainer.write(safetensors, april_gan)
    state.unlink(missing_ok=True)
    if not keep_cache:
        trainer.features.forget(pictures)
    click.echo(
        f"{safetensors} (ours), {april_gan} (APRIL-GAN's); try it with `flawline evaluate --adapter {safetensors}`"
    )


def _about_cache(folder: Path, cache: Any, pictures: Sequence[Path]) -> str:
    needed, left = cache.needed_bytes(pictures), cache.left_bytes
    text = f"CLIP's features of {len(pictures)} pictures go to {folder}: up to {megabytes(needed)} still to come"
    if needed <= left:
        return text
    return f"{text}, of which {megabytes(left)} fit (half of the free disk); the others are computed in every epoch"


def _digest(path: Path | None) -> str | None:
    from flawline.models.bundle import file_sha256

    return None if path is None else file_sha256(path)


def _own_layers(bundle: Any) -> str | None:
    layers = bundle.manifest.adapter
    return None if layers is None else bundle.checksum(layers.checkpoint)


WORKBENCH = (evaluate, train_adapter, calibrate)
