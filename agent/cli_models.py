"""`flawline models`: which bundles there are, what is in them, whether they are whole, and fetching them."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import rich.console
import rich.table

from flawline.agent.progress import WorkProgress
from flawline.agent.progress_bytes import ByteProgress, megabytes
from flawline.agent.set_options import FOLDER, KIND, split
from flawline.config.errors import BundleError, ConfigError, FlawlineError
from flawline.config.recipe import Recipe
from flawline.models.bundle import MANIFEST, SHIPPED, Bundle, find, installed, read_bundle, user_folder
from flawline.models.known_bundles import KNOWN, Activation, KnownBundle, known_bundle


@click.group("models")
def models() -> None:
    """Model bundles: list, info, verify, fetch, thresholds."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="one JSON array")
def list_bundles(as_json: bool) -> None:
    """The bundles on this machine, and those that can be fetched by name."""
    rows: list[dict[str, Any]] = []
    for folder in installed():
        try:
            rows.append(_about(read_bundle(folder)))
        except BundleError as error:
            rows.append({"name": folder.name, "installed": True, "folder": str(folder), "error": str(error)})
    here = {row["name"] for row in rows}
    rows += [_about_known(known) for known in KNOWN.values() if known.name not in here]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = rich.table.Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "CLIP", "SAM", "adapter", "size", "licence", "folder"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for row in rows:
        where = row["folder"] if row["installed"] else f"not here: flawline models fetch {row['name']}"
        if "error" in row:
            table.add_row(row["name"], "", "", "", "", "", row["error"])
        else:
            adapter = "" if row["adapter"] is None else "yes" if row["adapter"] else "no"
            licences = ", ".join(sorted({licence.partition(",")[0] for licence in row["licences"]}))
            table.add_row(row["name"], row["clip"], row["sam"], adapter, megabytes(row["size"]), licences, where)
    _print(table)


@models.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def info(name: str, as_json: bool) -> None:
    """What a bundle is made of. NAME is a name or a folder."""
    if name in KNOWN and name not in {folder.name for folder in installed()} and not Path(name, MANIFEST).is_file():
        about = _about_known(KNOWN[name])
    else:
        bundle = read_bundle(find(name))
        about = _about(bundle) | {"manifest": bundle.manifest.model_dump(mode="json", by_alias=True)}
    if as_json:
        click.echo(json.dumps(about))
        return
    table = rich.table.Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _readable(about):
        table.add_row(label, value)
    _print(table)


@models.command()
@click.argument("name")
def verify(name: str) -> None:
    """Compare every file of a bundle with the checksum in its bundle.toml."""
    bundle = read_bundle(find(name))
    bundle.verify()
    total = sum(bundle.path(file.name).stat().st_size for file in bundle.manifest.files)
    click.echo(f"{bundle.name}: {len(bundle.manifest.files)} files, {megabytes(total)}, all as in bundle.toml")


@models.command()
@click.argument("name")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, dir_okay=False),
    help="linear layers: APRIL-GAN's .pth, or what `flawline train-adapter` wrote",
)
@click.option(
    "--activation",
    type=click.Choice(["gelu", "quickgelu"]),
    help="of CLIP's towers, as the layers were trained with [default: gelu with an adapter, else quickgelu]",
)
@click.option("--mirror", metavar="URL", help="fetch URL/FILE instead of the published addresses")
@click.option("--from", "source", type=click.Path(path_type=Path, file_okay=False), help="copy from this folder")
@click.option("--to", "parent", type=click.Path(path_type=Path, file_okay=False), help="folder of bundles")
def fetch(
    name: str,
    adapter: Path | None,
    activation: Activation | None,
    mirror: str | None,
    source: Path | None,
    parent: Path | None,
) -> None:
    """Fetch a bundle that is known by name: vit-h, vit-l, vit-b, vit-t.

    Interrupted, the same command goes on where it was. Without --adapter the training-free localiser serves.
    """
    known = known_bundle(name)
    if mirror is not None and source is not None:
        raise ConfigError("--mirror and --from: give one of them")
    if mirror is not None and not mirror.startswith(("http://", "https://")):
        raise ConfigError(f"--mirror {mirror}: is not an http:// or https:// address")
    if source is not None and not source.is_dir():
        raise ConfigError(f"--from {source}: is not a folder")
    from flawline.models.fetch_bundle import FetchPlan, fetch_bundle

    plan = FetchPlan(known, parent or user_folder(), adapter, activation, mirror, source)
    had_thresholds = (plan.folder / MANIFEST).is_file() and read_bundle(plan.folder).manifest.states_thresholds
    try:
        with ByteProgress() as progress:
            bundle = fetch_bundle(plan, progress.update)
    except KeyboardInterrupt:
        raise FlawlineError(f"{plan.folder}: interrupted; the same command goes on from there") from None
    click.echo(f"{bundle.name}: {bundle.folder}")
    if bundle.manifest.adapter is None:
        click.echo("no adapter: the training-free localiser serves; --adapter FILE adds trained layers")
    if not bundle.manifest.states_thresholds:
        gone = "its thresholds were of other layers and are gone" if had_thresholds else "it has no thresholds yet"
        click.echo(f"{gone} (0.5 serves, which nobody chose): `flawline models thresholds`, and calibrate")


@models.command()
@click.argument("name")
@click.option("--dataset", "kind", type=KIND, required=True, help="how the folder is laid out")
@click.option("--root", type=FOLDER, required=True, help="an auxiliary set with masks: never the one to be judged")
@click.option("--category", "named", multiple=True, callback=split, help="only these classes", metavar="C,C...")
@click.option("--limit", type=click.IntRange(min=1), help="at most so many good and so many defective pictures a class")
@click.option("--object", "words", help="the object's name in the prompts [default: the class's name]")
@click.option(
    "--adapter", type=click.Path(path_type=Path, dir_okay=False), help="other layers: print, and write nothing"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", show_default=True)
@click.option("--tolerate", is_flag=True, help="pictures without a fitting mask count for the decision only")
@click.option("--dry-run", is_flag=True, help="print, and write nothing")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def thresholds(
    name: str,
    kind: Any,
    root: Path,
    named: list[str],
    limit: int | None,
    words: str | None,
    adapter: Path | None,
    device: str,
    precision: Any,
    tolerate: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Choose a bundle's thresholds on an auxiliary set, and write them into its bundle.toml.

    S_a's by the largest pixel F1 of CLIP's map, the decision's by the largest balanced accuracy of the image score.
    """
    folder = find(name)
    writes = adapter is None and not dry_run
    if writes and folder.resolve().is_relative_to(SHIPPED.resolve()):
        raise ConfigError(f"{folder}: comes with flawline and has thresholds of its own; --dry-run only prints")
    if writes and not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: cannot be written; --dry-run only prints")
    from flawline.models import datasets, evaluate

    categories = datasets.read_dataset(kind, root, named, tolerate=tolerate)
    if limit is not None:
        categories = [evaluate.subset(category, limit) for category in categories]
    recipes = {
        category.name: Recipe(object=words or datasets.object_words(kind, category.name)) for category in categories
    }
    from flawline.models.adapter_file import with_adapter
    from flawline.models.inspector import Inspector
    from flawline.models.thresholds import choose_thresholds, write_thresholds

    inspector = Inspector.load(folder, device=device, precision=precision)
    if adapter is not None:
        inspector = Inspector(with_adapter(inspector.towers, adapter))
    with WorkProgress("thresholds") as progress:
        chosen = choose_thresholds(inspector, categories, recipes, progress)
    chosen_on = f"{kind} {root.resolve().name}: {chosen.pictures} pictures of {len(categories)} classes"
    if writes:
        write_thresholds(inspector.towers.bundle, chosen, chosen_on)
    if as_json:
        click.echo(json.dumps(asdict(chosen) | {"chosen_on": chosen_on, "written": str(folder) if writes else None}))
        return
    click.echo(f"region {chosen.region:.3f}: pixel F1 {chosen.pixel_f1:.3f} of CLIP's map")
    click.echo(f"decision {chosen.decision:.3f}: balanced accuracy {chosen.balanced_accuracy:.3f}")
    if writes:
        click.echo(f"written to {folder / MANIFEST}; a line of its own still wants `flawline calibrate`")


def _about(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    sizes = {}
    for file in manifest.files:
        path = bundle.folder / file.name
        sizes[file.name] = path.stat().st_size if path.is_file() else None
    return {
        "name": bundle.folder.name,
        "installed": True,
        "folder": str(bundle.folder),
        "description": manifest.description,
        "sha256": bundle.sha256,
        "clip": manifest.clip.architecture or str(manifest.clip.config),
        "sam": manifest.sam.architecture,
        "adapter": manifest.adapter is not None,
        "size": sum(size or 0 for size in sizes.values()),
        "licences": [file.licence for file in manifest.files],
        "files": [file.model_dump() | {"size": sizes[file.name]} for file in manifest.files],
    }


def _about_known(known: KnownBundle) -> dict[str, Any]:
    return {
        "name": known.name,
        "installed": False,
        "folder": None,
        "description": known.description,
        "sha256": None,
        "clip": known.clip_architecture,
        "sam": known.sam_architecture,
        "adapter": None,
        "size": known.size,
        "licences": [file.licence for file in known.files],
        "files": [
            {"name": file.name, "sha256": file.sha256, "licence": file.licence, "source": file.url, "size": file.size}
            for file in known.files
        ],
    }


def _readable(about: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("name", about["name"]),
        ("description", about["description"]),
        ("folder", about["folder"] or f"not here: flawline models fetch {about['name']}"),
        ("sha256", about["sha256"] or ""),
    ]
    manifest = about.get("manifest")
    if manifest is None:
        lines += [("clip", about["clip"]), ("sam", about["sam"])]
    else:
        for table in ("clip", "adapter", "sam", "prompts", "thresholds"):
            for key, value in (manifest[table] or {}).items():
                if value is not None:
                    lines.append((f"{table}.{key}", str(value)))
    for file in about["files"]:
        size = "MISSING" if file["size"] is None else megabytes(file["size"])
        lines.append((file["name"], f"{size}, sha256 {file['sha256']}, {file['licence']}"))
        if file["source"]:
            lines.append(("", f"from {file['source']}"))
    return [(label, value) for label, value in lines if value or label == ""]


def _print(table: rich.table.Table) -> None:
    console = rich.console.Console()
    # elsewhere than on a terminal nothing is cut off to fit a width that nobody has
    (console if console.is_terminal else rich.console.Console(width=240)).print(table)
