"""Making a bundle that is known by name: its published files, the user's linear layers, and bundle.toml."""

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import tomlkit

from flawline import __version__
from flawline.config.errors import BundleError
from flawline.models.bundle import MANIFEST, Bundle, Manifest, file_sha256, installed, read_bundle, write_manifest
from flawline.models.fetch import Patience, Progress, copy_file, download, require_space, take_from
from flawline.models.known_bundles import Activation, AdapterFile, KnownBundle, PublishedFile, manifest_of


@dataclass(frozen=True)
class FetchPlan:
    """What is fetched, and from where. `parent` is the folder of bundles; the bundle is PARENT/NAME."""

    known: KnownBundle
    parent: Path
    adapter: Path | None = None  # linear layers to add
    activation: Activation | None = None  # left out: what the adapter needs
    mirror: str | None = None  # address whose folder holds the files by their published names
    source: Path | None = None  # folder that holds them
    patience: Patience = field(default_factory=Patience)

    @property
    def folder(self) -> Path:
        """Where the bundle will be."""
        return self.parent / self.known.name


def fetch_bundle(plan: FetchPlan, progress: Progress) -> Bundle:
    """Bring every file, write bundle.toml last, and return the bundle.

    What is there already and right is kept; a file that another bundle on this machine has is linked. Raises
    BundleError naming the file.
    """
    folder = plan.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"{folder}: cannot be made: {error.strerror or error}") from error
    with _alone(folder):
        before = read_bundle(folder) if (folder / MANIFEST).is_file() else None
        if plan.adapter is not None:
            require_fitting(plan.adapter, plan.known)
        require_same_activation(plan, before)
        missing = [file for file in plan.known.files if not _is_here(file, folder, progress)]
        here = sum(_size(folder / f"{file.name}.part") for file in missing)
        require_space(folder, sum(file.size for file in missing) - here)
        if plan.source is not None:
            for file in missing:
                take_from(plan.source, file, folder / file.name, progress)
        else:
            asyncio.run(_download(plan, missing, progress))
        adapter = _add_adapter(plan, before)
        activation = plan.activation
        if activation is None and plan.adapter is not None:
            activation = activation_of(plan.adapter)
        if activation is None and before is not None and plan.adapter is None:
            activation = before.manifest.clip.activation
        wanted = manifest_of(plan.known, adapter, activation)
        write_manifest(folder, wanted if before is None else _with_own_keys(before, wanted))
    return read_bundle(folder)


def require_fitting(adapter: Path, known: KnownBundle) -> None:
    """Raises BundleError where the file does not hold one linear layer per tap of this CLIP."""
    import open_clip

    from flawline.models.checkpoints import load_weights, read_state_dict
    from flawline.models.localise import AdapterLocaliser

    config = open_clip.get_model_config(known.clip_architecture)
    layers = AdapterLocaliser([config["vision_cfg"]["width"]] * 4, config["embed_dim"], 100.0, False)
    load_weights(layers, read_state_dict(adapter), adapter)


def activation_of(adapter: Path) -> Activation | None:
    """What the layers were trained under, where their file says so."""
    from flawline.models.checkpoints import metadata

    said = metadata(adapter).get("activation")
    return said if said in ("gelu", "quickgelu") else None  # type: ignore[return-value]


def require_same_activation(plan: FetchPlan, before: Bundle | None) -> None:
    """Raises BundleError where the layers, given or kept, say that they were trained under another than is wanted."""
    layers = plan.adapter
    if layers is None and before is not None and before.manifest.adapter is not None:
        layers = before.folder / before.manifest.adapter.checkpoint
    said = activation_of(layers) if layers is not None and plan.activation is not None else None
    if said not in (None, plan.activation):
        raise BundleError(f"--activation {plan.activation}: {layers} was trained under {said}: give that, or nothing")


async def _download(plan: FetchPlan, files: list[PublishedFile], progress: Progress) -> None:
    agent = {"User-Agent": f"flawline/{__version__}"}
    async with aiohttp.ClientSession(headers=agent, trust_env=True) as session:
        for file in files:
            if plan.mirror is not None:
                file = replace(file, url=f"{plan.mirror.rstrip('/')}/{file.name}")
            await download(session, file, plan.folder / file.name, progress, plan.patience)


def _is_here(file: PublishedFile, folder: Path, progress: Progress) -> bool:
    """True where the file is in the folder and right, or could be linked from another bundle."""
    target = folder / file.name
    for path in (target, *_elsewhere(file, folder)):
        if _size(path) == file.size and file_sha256(path) == file.sha256:
            if path != target:
                target.unlink(missing_ok=True)
                try:
                    os.link(path, target)
                except OSError:  # another file system
                    copy_file(path, target)
            progress(file.name, file.size, file.size)
            return True
    return False


def _elsewhere(file: PublishedFile, folder: Path) -> Iterator[Path]:
    for other in [*installed(), *folder.parent.glob("*")]:
        if other != folder and (other / file.name).is_file():
            yield other / file.name


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _add_adapter(plan: FetchPlan, before: Bundle | None) -> AdapterFile | None:
    if plan.adapter is not None:
        target = plan.folder / f"adapter{plan.adapter.suffix}"
        copy_file(plan.adapter, target)
        # The name alone: the manifest's hash is the bundle's, and the same files make the same one on any machine.
        return AdapterFile(target.name, file_sha256(target), plan.adapter.name)
    settings = before.manifest.adapter if before is not None else None
    if before is None or settings is None:
        return None
    entry = next(file for file in before.manifest.files if file.name == settings.checkpoint)
    return AdapterFile(entry.name, entry.sha256, entry.source or "")


def _with_own_keys(before: Bundle, wanted: str) -> str:
    """The bundle.toml that is there, with its own keys (thresholds, words, precision) kept, as `wanted` says of files.

    Thresholds that were chosen with other layers go: they are of another scale.
    """
    text = (before.folder / MANIFEST).read_text(encoding="utf-8")
    document, new = tomlkit.parse(text), tomlkit.parse(wanted)
    now = Manifest.model_validate(new.unwrap())
    if _judging(before.manifest) != _judging(now):
        document.pop("thresholds", None)
    document["files"] = new["files"]
    for table in ("clip", "sam", "adapter"):
        for key, value in new.get(table, {}).items():
            document.setdefault(table, tomlkit.table())[key] = value
    same = Manifest.model_validate(document.unwrap()) == before.manifest
    return text if same else tomlkit.dumps(document)


def _judging(manifest: Manifest) -> tuple[object, ...]:
    """What decides of which scale the scores are."""
    adapter = manifest.adapter
    layers = None if adapter is None else next(f.sha256 for f in manifest.files if f.name == adapter.checkpoint)
    return manifest.clip.activation, layers


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process fetches into a folder; the lock goes with the process."""
    try:
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BundleError(f"{folder}: another process is fetching this bundle") from error
        yield
