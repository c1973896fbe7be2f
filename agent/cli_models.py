"""`flawline models`: which bundles there are, what is in them, whether they are whole, and fetching them."""

import json
from pathlib import Path
from typing import Any

import click
import rich.console
import rich.table

from flawline.agent.progress_bytes import ByteProgress, megabytes
from flawline.config.errors import BundleError, ConfigError, FlawlineError
from flawline.models.bundle import MANIFEST, Bundle, find, installed, read_bundle, user_folder
from flawline.models.known_bundles import KNOWN, Activation, KnownBundle, known_bundle


@click.group("models")
def models() -> None:
    """Model bundles: list, info, verify, fetch."""


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
    try:
        with ByteProgress() as progress:
            bundle = fetch_bundle(plan, progress.update)
    except KeyboardInterrupt:
        raise FlawlineError(f"{plan.folder}: interrupted; the same command goes on from there") from None
    click.echo(f"{bundle.name}: {bundle.folder}")
    if bundle.manifest.adapter is None:
        click.echo("no adapter: the training-free localiser serves; --adapter FILE adds trained layers")


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
