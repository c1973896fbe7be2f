"""The loaded models of a bundle on one device: CLIP, what locates with it, SAM, and what refines with it."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flawline.config.errors import BundleError, ConfigError
from flawline.config.recipe import PRECISION_OF, CascadeSettings, Precision, PromptSettings, Recipe
from flawline.config.settings import DEVICES
from flawline.models.bundle import MANIFEST, Bundle, open_bundle
from flawline.models.checkpoints import Undrawn, load_weights, metadata, read_state_dict
from flawline.models.clip import DenseClip, DenseFeatures
from flawline.models.fold import fold_trunks
from flawline.models.frames import FrameGeometry
from flawline.models.graphs import Graphs
from flawline.models.localise import AdapterLocaliser, WindowLocaliser
from flawline.models.prompt import PointPrompts, point_prompts
from flawline.models.refine import Cascade, Level, MaskRefiner
from flawline.models.sam import build_sam, load_sam
from flawline.models.sam_attention import fuse_attention
from flawline.models.switches import Switches

SETTLED = PromptSettings().model_dump(include={"region", "region_threshold", "region_percent", "features"})
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
APRIL_GAN = {f"fc.{tap}.weight": (768, 1024) for tap in range(4)}
"""Shapes of the layers that APRIL-GAN publishes: trained under gelu, and their files do not say so."""


@dataclass(frozen=True)
class Towers:
    """CLIP and SAM of one bundle, in eval mode, without gradients.

    The two image encoders, which cost nearly all of the time, compute in `dtype`; text, linear layers,
    prompts and the mask decoder in float32.
    """

    bundle: Bundle
    device: torch.device
    dtype: torch.dtype
    clip: DenseClip
    adapter: AdapterLocaliser | None
    sam: Any
    refiner: MaskRefiner
    switches: Switches
    graphs: Graphs  # of `dense`, `embed`, `prompts` and `refine`, which read nothing on the host

    @property
    def precision(self) -> Precision:
        """`dtype` as settings name it."""
        return PRECISION_OF[str(self.dtype).removeprefix("torch.")]

    def dense(self, clip_input: Tensor) -> DenseFeatures:
        """(B, 3, S, S) normalised -> the image tower's features at its taps and at a memory's levels."""

        def part(given: Tensor) -> list[Tensor]:
            features = self.clip.dense(given)
            return [*features.taps, *(features.levels if features.levels is not features.taps else ())]

        made = self.graphs.run("clip", part, clip_input)
        taps = made[: len(self.clip.indices)]
        return DenseFeatures(taps, made[len(taps) :] or taps)

    def map(self, taps: list[Tensor] | None, clip_input: Tensor, text: Tensor, localiser: str) -> Tensor:
        """(B, S, S) float32: P(abnormal), by the adapter from `taps` or by windows from `clip_input`."""
        if localiser == "windows":
            return WindowLocaliser(self.clip)(clip_input, text, self.clip.input_size)
        assert self.adapter is not None
        assert taps is not None
        result: Tensor = self.adapter(taps, text, self.clip.input_size)
        return result

    def localiser_of(self, recipe: Recipe) -> str:
        """`adapter` or `windows`. Raises BundleError where the bundle cannot do what the recipe asks."""
        wanted = recipe.localiser
        if wanted == "auto":
            wanted = "adapter" if self.adapter is not None else "windows"
        if wanted == "adapter" and self.adapter is None:
            raise BundleError(
                f'{self.bundle.folder / MANIFEST}: has no adapter; use localiser = "windows", or train one'
            )
        if wanted == "windows":
            try:
                WindowLocaliser(self.clip)
            except BundleError as error:
                raise BundleError(f"{self.bundle.folder / MANIFEST}: {error}") from error
        return wanted

    def embed(self, fitted: Tensor) -> Tensor:
        """(B, 3, h, w) RGB in [0, 255], long side P -> SAM's image embedding (B, C, g, g) float32.

        A place for every 16 px of SAM's frame, with `lite0` for every 8.
        """

        def part(given: Tensor) -> list[Tensor]:
            prepared: Tensor = self.sam.preprocess(given.float())
            return [self.sam.image_encoder(prepared.to(self.dtype)).float()]

        return self.graphs.run("encode", part, fitted)[0]

    def prompts(
        self,
        maps: Tensor,
        regions: Tensor,
        features: Tensor,
        geometry: FrameGeometry,
        settings: PromptSettings,
        most: int | None,
    ) -> PointPrompts:
        """See `point_prompts`."""
        if most is not None:  # the split into regions reads on the host
            return point_prompts(maps, regions, features, geometry, settings, most)

        def part(maps: Tensor, regions: Tensor, features: Tensor) -> list[Tensor]:
            made = point_prompts(maps, regions, features, geometry, settings)
            return [made.points, made.labels, made.present]

        # How S_a was cut and which features these are, what follows does not ask: one graph for all such recipes.
        asked = settings.model_copy(update=SETTLED)
        return PointPrompts(*self.graphs.run(("prompt", geometry, asked), part, maps, regions, features))

    def refine(
        self, embedding: Tensor, prompts: PointPrompts, geometry: FrameGeometry, settings: CascadeSettings
    ) -> Cascade:
        """See `MaskRefiner.cascade`."""
        if prompts.frame is not None:
            return self.refiner.cascade(embedding, prompts, geometry, settings)

        def part(embedding: Tensor, *given: Tensor) -> list[Tensor]:
            made = self.refiner.cascade(embedding, PointPrompts(*given), geometry, settings)
            levels = [one for level in made.levels for one in (level.logits, level.score, level.index)]
            return levels if made.box is None or made.box_present is None else [*levels, made.box, made.box_present]

        given = (embedding, prompts.points, prompts.labels, prompts.present)
        made = self.graphs.run(("cascade", geometry, settings), part, *given)
        whole = 3 * settings.levels
        levels = [Level(made[at], made[at + 1], made[at + 2], geometry) for at in range(0, whole, 3)]
        box, box_present = made[whole:] or (None, None)
        return Cascade(levels, box, box_present)


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError where there is no such device."""
    if not re.fullmatch(DEVICES, device):
        raise ConfigError(f"model.device = {device!r}: must be auto, cpu, cuda or cuda:N")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f'model.device = {device!r}: this machine has {found} usable CUDA devices; write "auto" or "cpu"'
        )
    return chosen


def choose_precision(precision: str, device: torch.device, wanted: str | None = None) -> torch.dtype:
    """`auto` is fp32 on the CPU, on CUDA what the bundle has `wanted`, else bf16 where the device has it (else fp16).

    Raises ConfigError.
    """
    if precision != "auto":
        if precision not in PRECISIONS:
            raise ConfigError(f"model.precision = {precision!r}: must be auto, {', '.join(PRECISIONS)}")
        return PRECISIONS[precision]
    if device.type != "cuda":
        return torch.float32
    if wanted is not None:
        return PRECISIONS[wanted]
    # Emulated, bf16 is slower than fp16 (cards before compute capability 8.0).
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@torch.no_grad()
def load_towers(
    bundle: str | os.PathLike[str] | Bundle,
    device: str = "auto",
    precision: str = "auto",
    switches: Switches | None = None,
) -> Towers:
    """Check every file of the bundle and load it; `switches` as the environment has them, unless given.

    Raises BundleError naming the file, ConfigError.
    """
    switches = Switches.from_environment() if switches is None else switches
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen, opened.manifest.precision)
    try:
        return _built(opened, chosen, dtype, switches)
    except (AssertionError, TypeError, ValueError) as error:  # of segment_anything and timm, of sizes that do not go
        raise BundleError(f"{opened.folder / MANIFEST}: does not describe models: {error}") from error
    except BundleError as error:
        if str(opened.folder) in str(error):
            raise
        raise BundleError(f"{opened.folder / MANIFEST}: {error}") from error


def _built(opened: Bundle, device: torch.device, dtype: torch.dtype, switches: Switches) -> Towers:
    manifest = opened.manifest
    with ThreadPoolExecutor(1, "verify") as beside:
        verified = beside.submit(opened.verify)
        try:
            with Undrawn():
                clip = DenseClip(manifest.clip, opened.folder)
                trunk = getattr(clip.model.visual, "trunk", None)
                sam = build_sam(manifest.sam, trunk)
        finally:
            verified.result()  # a damaged file is the better reason where both fail
    clip.load(opened.path(manifest.clip.checkpoint))
    load_sam(sam, manifest.sam, opened.path(manifest.sam.checkpoint))
    adapter = load_adapter(opened, clip) if manifest.adapter is not None else None
    return assemble(opened, clip, sam, adapter, device, dtype, switches)


def assemble(
    bundle: Bundle,
    clip: DenseClip,
    sam: Any,
    adapter: AdapterLocaliser | None,
    device: torch.device,
    dtype: torch.dtype,
    switches: Switches,
) -> Towers:
    """Models with their weights, brought to the device and the precision."""
    if switches.batchnorm == "folded":
        fold_trunks(getattr(clip.model.visual, "trunk", None), sam.image_encoder)
    layout = torch.channels_last if hasattr(clip.model.visual, "trunk") else torch.contiguous_format
    clip.to(device)
    clip.model.visual.to(dtype).to(memory_format=layout)
    sam.to(device)
    sam.image_encoder.to(dtype)
    fuse_attention(sam.image_encoder, switches.attention)
    localiser = adapter.to(device) if adapter else None
    graphs = Graphs(device, switches.graphs == "on")
    return Towers(bundle, device, dtype, clip, localiser, sam, MaskRefiner(sam), switches, graphs)


def load_adapter(bundle: Bundle, clip: DenseClip) -> AdapterLocaliser:
    """The bundle's linear layers on CLIP's features. Raises BundleError naming the file."""
    settings = bundle.manifest.adapter
    assert settings is not None
    path: Path = bundle.path(settings.checkpoint)
    adapter = AdapterLocaliser(clip.tap_channels(), clip.embed_dim, settings.temperature, settings.centred)
    require_activation(path, clip, stated=bundle.manifest.clip.activation is not None)
    load_weights(adapter, {name: tensor.float() for name, tensor in read_state_dict(path).items()}, path)
    return adapter.eval().requires_grad_(False)


def require_activation(path: Path, clip: DenseClip, *, stated: bool = False) -> None:
    """Layers belong to the kind of GELU that they were trained under; ours say which. Raises BundleError.

    Where a file says nothing and may be APRIL-GAN's, quickgelu must be `stated` for these very layers: by a bundle.toml
    that names both. Else hours of measuring would end in maps that are merely worse.
    """
    trained = metadata(path).get("activation")
    if trained not in (None, clip.activation):
        raise BundleError(
            f"{path}: these layers were trained under {trained}, and this bundle's CLIP runs under {clip.activation}: "
            f'set clip.activation = "{trained}"'
        )
    if trained is None and clip.activation == "quickgelu" and not stated and _is_april_gans(path):
        raise BundleError(
            f"{path}: these layers do not say under which GELU they were trained, and APRIL-GAN's, which have these "
            "shapes, were not under this CLIP's quickgelu: fetch the bundle with --activation gelu, or with the layers "
            "(--adapter FILE; where they were trained under quickgelu, with --activation quickgelu too)"
        )


def _is_april_gans(path: Path) -> bool:
    shapes = {name: tuple(tensor.shape) for name, tensor in read_state_dict(path).items() if name.endswith("weight")}
    return shapes == APRIL_GAN
