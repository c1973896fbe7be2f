"""Model bundles: the folder's `bundle.toml`, its checks, and where bundles are found by name. No torch here.

A bundle is one folder with `bundle.toml` and the files it names. Names are looked up, in this order, in
the folders of the environment variable `FLAWLINE_BUNDLES` (separated as in PATH), in the user's data
folder, and among the bundles shipped in the package.
"""

import hashlib
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flawline.config.errors import BundleError
from flawline.config.recipe import MOST_SENTENCES, with_one_place

MANIFEST = "bundle.toml"
SHIPPED = Path(__file__).parent / "bundles"
SCHEMA = "flawline.bundle/1"

Triple = tuple[float, float, float]


class Table(BaseModel):
    """Base of the manifest's tables: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClipSettings(Table):
    """Which CLIP, and how its image tower is read."""

    architecture: str | None = Field(None, description="a model name of open_clip, e.g. ViT-L-14-336")
    config: str | None = Field(None, description="file in the bundle: a model configuration as open_clip's")
    checkpoint: str = Field(description="file with the weights")
    input_size: int = Field(ge=32, le=2048, description="S, edge of the square CLIP frame, px")
    taps: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="blocks whose tokens are read, counted from 1; for towers of convolutions the feature "
        "levels, counted from 0; left out: the quarters of the depth, or the last four levels",
    )
    activation: Literal["gelu", "quickgelu"] | None = Field(
        None, description="as the adapter was trained with; left out: the architecture's own"
    )
    mean: Triple | None = Field(None, description="of pixels in [0, 1]; left out: CLIP's own")
    std: Triple | None = Field(None, description="of pixels in [0, 1]; left out: CLIP's own")

    @model_validator(mode="after")
    def _one_source_of_the_architecture(self) -> Self:
        if (self.architecture is None) == (self.config is None):
            raise ValueError("give either architecture or config")
        return self


class AdapterSettings(Table):
    """The trained linear layers, one per tap."""

    checkpoint: str = Field(description="safetensors with fc.N.weight and fc.N.bias, or APRIL-GAN's .pth")
    temperature: float = Field(100.0, gt=0.0, description="factor of the cosine logits")
    centred: bool = Field(False, description="trained on tokens less the picture's mean token")


class DecoderSettings(Table):
    """Sizes of SAM's prompt encoder and mask decoder; the defaults are SAM's own."""

    dim: int = Field(256, ge=8, description="width of embeddings and tokens")
    depth: int = Field(2, ge=1, description="two-way transformer blocks")
    heads: int = Field(8, ge=1, description="attention heads")
    mlp_dim: int = Field(2048, ge=8, description="hidden width of the transformer's MLPs")
    mask_channels: int = Field(16, ge=4, description="hidden channels of the mask input's encoder")
    iou_depth: int = Field(3, ge=2, description="layers of the head that predicts the IoU")
    iou_hidden: int = Field(256, ge=8, description="its hidden width")


class SamSettings(Table):
    """Which SAM, and at what input size."""

    architecture: Literal["vit_h", "vit_l", "vit_b", "vit_t", "lite0"] = Field(description="image encoder")
    checkpoint: str = Field(description="file with the weights")
    input_size: int = Field(1024, ge=64, le=4096, description="edge of SAM's padded input frame, px")
    trunk_from_clip: bool = Field(False, description="lite0: the trunk is CLIP's, stored once there")
    own_stages: int = Field(
        0, ge=0, le=7, description="`trunk_from_clip`: the stem and so many of the trunk's first stages are SAM's own"
    )
    mean: Triple | None = Field(None, description="of pixels in [0, 255]; left out: the architecture's own")
    std: Triple | None = Field(None, description="of pixels in [0, 255]; left out: the architecture's own")
    decoder: DecoderSettings = Field(default_factory=lambda: DecoderSettings.model_validate({}))

    @model_validator(mode="after")
    def _fits_the_architecture(self) -> Self:
        if self.trunk_from_clip and self.architecture != "lite0":
            raise ValueError("trunk_from_clip goes with architecture lite0 only")
        if self.own_stages and not self.trunk_from_clip:
            raise ValueError("own_stages goes with trunk_from_clip only")
        step = 32 if self.architecture == "lite0" else 16
        if self.input_size % step:
            raise ValueError(f"input_size {self.input_size} is not a multiple of {step}")
        return self


class PromptWords(Table):
    """The bundle's own words, where its text tower was trained on others than the standard ones."""

    states_normal: tuple[str, ...] | None = Field(None, min_length=1, max_length=MOST_SENTENCES)
    states_abnormal: tuple[str, ...] | None = Field(None, min_length=1, max_length=MOST_SENTENCES)
    templates: tuple[str, ...] | None = Field(None, min_length=1, max_length=128)  # ImageNet's list has 80

    @field_validator("states_normal", "states_abnormal", "templates")
    @classmethod
    def _leave_a_place_for_the_object(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return with_one_place(value)


class Thresholds(Table):
    """What a recipe falls back to. Where a bundle states none, 0.5 holds, which nobody chose."""

    region: float = Field(0.5, ge=0.0, le=1.0, description="S_a = CLIP map >= this")
    decision: float = Field(0.5, ge=0.0, le=1.0, description="a pixel of the final map >= this is defective")
    chosen_on: str | None = Field(None, description="which pictures both were chosen on")


class BundleFile(Table):
    """One file of the bundle, its checksum and its licence."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    licence: str = Field(description="name of the licence, or where it stands")
    source: str | None = Field(None, description="where the file came from")

    @field_validator("name")
    @classmethod
    def _stays_in_the_folder(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in value:
            raise ValueError(f"{value!r} must be a relative path inside the bundle")
        return value


class Manifest(Table):
    """`bundle.toml` as a whole."""

    schema_: Literal["flawline.bundle/1"] = Field(alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    description: str = ""
    clip: ClipSettings
    adapter: AdapterSettings | None = None
    sam: SamSettings
    prompts: PromptWords = Field(default_factory=lambda: PromptWords.model_validate({}))
    thresholds: Thresholds = Field(default_factory=lambda: Thresholds.model_validate({}))
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(
        None, description='what `model.precision = "auto"` takes on CUDA; left out: bf16, where the device has it'
    )
    files: tuple[BundleFile, ...] = ()

    @property
    def states_thresholds(self) -> bool:
        """Whether somebody chose them."""
        return {"region", "decision"} <= self.thresholds.model_fields_set

    @model_validator(mode="after")
    def _every_used_file_has_a_checksum(self) -> Self:
        used = [self.clip.config, self.clip.checkpoint, self.sam.checkpoint]
        used.append(self.adapter.checkpoint if self.adapter else None)
        listed = {file.name for file in self.files}
        missing = sorted({name for name in used if name is not None} - listed)
        if missing:
            raise ValueError(f"no [[files]] entry with a sha256 for {', '.join(missing)}")
        return self


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `sha256` is that of bundle.toml, which holds the hashes of all other files."""

    folder: Path
    manifest: Manifest
    sha256: str

    @property
    def name(self) -> str:
        return self.manifest.name

    def with_sam_input(self, size: int) -> Self:
        """The same files with another input of SAM, px; position embeddings are brought to it while loading."""
        sam = self.manifest.sam.model_copy(update={"input_size": size})
        return replace(self, manifest=self.manifest.model_copy(update={"sam": sam}))

    def path(self, name: str) -> Path:
        """The file `name` of this bundle. Raises BundleError if it isn't there."""
        path = self.folder / name
        if not path.is_file():
            raise BundleError(f"{path}: this file of bundle {self.name!r} is missing")
        return path

    def checksum(self, name: str) -> str:
        """The sha256 that bundle.toml states for the file `name`."""
        return next(file.sha256 for file in self.manifest.files if file.name == name)

    def verify(self) -> None:
        """Compare every file's sha256 with bundle.toml. Raises BundleError naming the first that differs."""
        for file in self.manifest.files:
            path = self.path(file.name)
            actual = file_sha256(path)
            if actual != file.sha256:
                raise BundleError(
                    f"{path}: checksum is {actual[:12]}…, bundle.toml says {file.sha256[:12]}…: "
                    "the file is corrupt or from another bundle; fetch it again"
                )


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file. Raises BundleError if it can't be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_bundle(folder: Path) -> Bundle:
    """Open the bundle in `folder`; weights are not read yet. Raises BundleError naming file and key."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{path}: not found; a bundle is a folder with a {MANIFEST}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        manifest = Manifest.model_validate(tomllib.loads(content.decode("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from error
    return Bundle(folder, manifest, hashlib.sha256(content).hexdigest())


def write_manifest(folder: Path, text: str) -> None:
    """Put this bundle.toml into the folder, as a whole or not at all. Raises BundleError naming the file."""
    path = folder / MANIFEST
    part = path.with_suffix(".toml.part")
    try:
        Manifest.model_validate(tomllib.loads(text))
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written: {error.strerror or error}") from error


def user_folder() -> Path:
    """Where fetched bundles are kept."""
    return platformdirs.user_data_path("flawline") / "bundles"


def bundle_folders() -> list[Path]:
    """The folders whose subfolders are bundles, in the order of search."""
    extra = [Path(part) for part in os.environ.get("FLAWLINE_BUNDLES", "").split(os.pathsep) if part]
    return [*extra, user_folder(), SHIPPED]


def installed() -> Iterator[Path]:
    """Every bundle folder on this machine, each name once, as `find` would choose it."""
    seen: set[str] = set()
    for parent in bundle_folders():
        for manifest in sorted(parent.glob(f"*/{MANIFEST}")):
            if manifest.parent.name not in seen:
                seen.add(manifest.parent.name)
                yield manifest.parent


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a bundle given by name or path. Raises BundleError that says where was looked."""
    text = os.fspath(name_or_path)
    if os.sep in text or text.startswith(".") or isinstance(name_or_path, os.PathLike):
        return Path(text)
    for parent in (*bundle_folders(), Path()):  # a folder that happens to lie here takes no known bundle's place
        if (parent / text / MANIFEST).is_file():
            return parent / text
    names = ", ".join(folder.name for folder in installed()) or "none"
    raise BundleError(
        f"no bundle {text!r} on this machine (here: {names}); give a folder with a {MANIFEST}, "
        f"or see `flawline models list` and `flawline models fetch`"
    )


def open_bundle(name_or_path: str | os.PathLike[str]) -> Bundle:
    """Find and open a bundle by name or folder. Raises BundleError."""
    return read_bundle(find(name_or_path))
