"""Published methods beside ours, from their released checkpoints: SDP, SDP+ (CLIP-AD) and AnomalyCLIP.

Each has a CLIP of its own, taken from a bundle, and the frame, words and smoothing that its authors gave it. Maps come
out in [0, 1] by a fixed scale, which changes no metric. Arithmetic is float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from open_clip.convert import convert_state_dict
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import BundleError, ConfigError
from flawline.models.bundle import Bundle, file_sha256, open_bundle
from flawline.models.checkpoints import load_weights, read_state_dict
from flawline.models.clip import DenseClip
from flawline.models.frames import squash
from flawline.models.localise import AdapterLocaliser
from flawline.models.two_path import STAGES, check_tower, joint, staged, summed
from flawline.models.words import ensemble

SDP_NORMAL = (
    *("flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect", "{} without damage"),
    *("{} without scratch", "{} without crack", "{} without contamination"),
)
SDP_ABNORMAL = (
    *("damaged {}", "imperfect {}", "blemished {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage"),
    *("{} with scratch", "{} with crack", "{} with contamination"),
)
SDP_TEMPLATES = tuple(
    f"a {how}photo of {article} {{}}{what}."
    for how, what in (
        *((f"{kind} ", "") for kind in ("cropped", "close-up", "bright", "dark", "jpeg corrupted", "blurry")),
        *(("", end) for end in ("", " for visual inspection", " for anomaly detection")),
    )
    for article in ("a", "the")
) + tuple(f"a photo of {article} {size} {{}}." for size in ("small", "large") for article in ("a", "the"))
SDP_LOGITS = 100.0  # SDP+'s factor of cosines
ANOMALYCLIP_BLOCKS = 19
ANOMALYCLIP_TEMPERATURE = 0.07
ANOMALYCLIP_SMOOTHING = 4.0  # px of its frame


@dataclass(frozen=True)
class PeerSpec:
    """`--peer METHOD=BUNDLE[,FILE]`: whose CLIP, and the method's own checkpoint."""

    method: str
    bundle: str
    file: Path | None

    @classmethod
    def parse(cls, text: str) -> "PeerSpec":
        """Raises ConfigError."""
        method, _, rest = text.partition("=")
        bundle, _, file = rest.partition(",")
        if method not in PEERS:
            raise ConfigError(f"--peer {text}: {method!r} is not known (there are: {', '.join(PEERS)})")
        if not bundle:
            raise ConfigError(f"--peer {text}: give METHOD=BUNDLE, or METHOD=BUNDLE,FILE")
        if PEERS[method].wants_file != bool(file):
            raise ConfigError(f"--peer {text}: {method} {'needs its checkpoint' if not file else 'has no checkpoint'}")
        return cls(method, bundle, Path(file) if file else None)

    def resolved(self) -> "PeerSpec":
        """The same with paths that hold in another working folder. Raises BundleError."""
        file = None if self.file is None else self.file.resolve()
        return PeerSpec(self.method, str(open_bundle(self.bundle).folder.resolve()), file)

    def identity(self) -> list[str | None]:
        """Changes with the models. Raises BundleError."""
        checksum = None if self.file is None else file_sha256(self.file)
        return [self.method, open_bundle(self.bundle).sha256, checksum]


class Peer(Protocol):
    """A method with its models loaded."""

    wants_file: bool

    def __init__(self, spec: PeerSpec, device: torch.device, dataset: str) -> None:
        """Raises BundleError, ConfigError."""

    def __call__(self, pixels: Tensor, name: str) -> Tensor:
        """(T, 3, h, w) bytes and the object's name -> (T, S, S) float32 in [0, 1], in the method's own frame."""


def load_peers(specs: Iterable[PeerSpec], device: torch.device, dataset: str) -> dict[str, Peer]:
    """By method. `dataset` chooses what the authors chose by it. Raises BundleError, ConfigError."""
    return {spec.method: PEERS[spec.method](spec, device, dataset) for spec in specs}


class Sdp:
    """SDP (CLIP-AD, arXiv 2311.00453): the second path's patches against representative words, over four stages."""

    wants_file = False
    lowest, highest = -float(STAGES), float(STAGES)

    def __init__(self, spec: PeerSpec, device: torch.device, dataset: str) -> None:
        """See `Peer`."""
        self._clip, _ = _clip_of(spec, device)
        self._visa = dataset == "visa"
        self._texts: dict[str, Tensor] = {}
        self._cluster = _dbscan()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, name: str) -> Tensor:
        """See `Peer`."""
        visual: Any = self._clip.model.visual
        text = self._text(name)
        planes = []
        for row in range(len(pixels)):
            normalised = _normalised(self._clip, pixels[row : row + 1])
            planes.append(self._map(visual, normalised, text))
        return (torch.cat(planes) - self.lowest) / (self.highest - self.lowest)

    def _map(self, visual: Any, normalised: Tensor, text: Tensor) -> Tensor:
        return smoothed(self._places(visual, staged(visual, normalised), text), 8.0)

    def _places(self, visual: Any, stages: Sequence[Any], text: Tensor) -> Tensor:
        """(B, S, S) in [-4, 4]."""
        total: Tensor | float = 0.0
        for stage in stages:
            weight = 2.0 * (joint(visual, stage.plain[:, :1]) @ text).softmax(dim=-1)  # (B, 1, 2), no temperature
            cosines = weight * (joint(visual, stage.dense[:, 1:]) @ text)
            total = total + 0.5 * (cosines[..., 1] - cosines[..., 0])
        return _enlarged(_grid(torch.as_tensor(total), visual), self._clip.input_size)

    def _text(self, name: str) -> Tensor:
        """(D, 2), normal and abnormal: of every ensemble the mean of its largest cluster."""
        if name not in self._texts:
            columns = []
            for states in (SDP_NORMAL, SDP_ABNORMAL):
                each = functional.normalize(self._clip.encode_text(ensemble(name, states, SDP_TEMPLATES)), dim=-1)
                columns.append(functional.normalize(self._representative(each), dim=0))
            self._texts[name] = torch.stack(columns, dim=1)
        return self._texts[name]

    def _representative(self, each: Tensor) -> Tensor:
        reach, least = (1.5, 25) if self._visa else (0.5, 15)
        labels = self._cluster(eps=reach, min_samples=least).fit(each.cpu().numpy()).labels_
        found, counts = np.unique(labels[labels >= 0], return_counts=True)
        if len(found):
            each = each[torch.from_numpy(labels == found[counts.argmax()]).to(each.device)]
        return each.mean(dim=0)


class SdpPlus(Sdp):
    """SDP+: SDP and, on the tower's own path, linear layers as APRIL-GAN has them."""

    wants_file = True
    highest = 2.0 * STAGES

    def __init__(self, spec: PeerSpec, device: torch.device, dataset: str) -> None:
        """See `Peer`."""
        super().__init__(spec, device, dataset)
        assert spec.file is not None
        width = int(self._clip.model.visual.transformer.width)
        self._layers = AdapterLocaliser([width] * STAGES, self._clip.embed_dim, SDP_LOGITS, centred=False)
        state = {name: tensor.float() for name, tensor in read_state_dict(spec.file).items()}
        load_weights(self._layers, state, spec.file)
        self._layers.to(device).eval().requires_grad_(False)

    def _map(self, visual: Any, normalised: Tensor, text: Tensor) -> Tensor:
        stages = staged(visual, normalised)
        taps = [_grid(stage.plain[:, 1:], visual).permute(0, 3, 1, 2) for stage in stages]
        layers = STAGES * self._layers(taps, text, self._clip.input_size)
        return smoothed(self._places(visual, stages, text) + layers, 2.0 if self._visa else 8.0)


class AnomalyClip:
    """AnomalyCLIP (ICLR 2024): learnt words that name no object, against the second path's patches."""

    wants_file = True

    def __init__(self, spec: PeerSpec, device: torch.device, dataset: str) -> None:
        """See `Peer`; its words do not depend on the data set."""
        self._clip, bundle = _clip_of(spec, device)
        visual: Any = self._clip.model.visual
        positions = _published_positions(self._clip, bundle)
        visual.positional_embedding.data.copy_(bilinear_positions(positions, visual.grid_size))
        assert spec.file is not None
        self._text = learnt_text(self._clip.model, read_learner(spec.file), spec.file)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, name: str) -> Tensor:
        """See `Peer`."""
        visual: Any = self._clip.model.visual
        planes = []
        for row in range(len(pixels)):
            tokens = summed(visual, _normalised(self._clip, pixels[row : row + 1]), ANOMALYCLIP_BLOCKS)[:, 1:]
            logits = joint(visual, tokens) @ self._text / ANOMALYCLIP_TEMPERATURE
            abnormal = logits.softmax(dim=-1)[..., 1]  # before it is enlarged
            planes.append(smoothed(_enlarged(_grid(abnormal, visual), self._clip.input_size), ANOMALYCLIP_SMOOTHING))
        return torch.cat(planes)


PEERS: dict[str, type[Peer]] = {"sdp": Sdp, "sdp_plus": SdpPlus, "anomalyclip": AnomalyClip}


def read_learner(path: Path) -> dict[str, Tensor]:
    """AnomalyCLIP's `prompt_learner` table. Raises BundleError naming the file."""
    state = read_state_dict(path)
    needed = [
        f"{part}_{sign}" for part in ("ctx", "token_prefix", "token_suffix", "tokenized_prompts") for sign in _SIGNS
    ]
    missing = [name for name in needed if name not in state]
    if missing:
        raise BundleError(f"{path}: is no AnomalyCLIP prompt learner: {missing[0]} is missing")
    return state


_SIGNS = ("pos", "neg")  # normal, abnormal


@torch.no_grad()
def learnt_text(model: Any, learner: dict[str, Tensor], path: Path) -> Tensor:
    """(D, 2) float32 unit vectors: the words of a prompt learner through the text tower.

    Word embeddings are the learner's. Before layers 2, 3, ... of the tower the tokens at positions 1 and on give way to
    the learner's for that layer, rounded to float16 as in the published code. Raises BundleError.
    """
    text = getattr(model, "text", model)
    weight = text.token_embedding.weight
    deep = [learner[name] for name in sorted(_deep_names(learner), key=lambda name: int(name.rsplit(".", 1)[1]))]
    columns = []
    for sign in _SIGNS:
        parts = [learner[f"{part}_{sign}"].float() for part in ("token_prefix", "ctx", "token_suffix")]
        tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).unsqueeze(0).to(weight)
        if tokens.shape[1:] != text.positional_embedding.shape:
            raise BundleError(
                f"{path}: words of {tuple(tokens.shape[1:])} do not fit a text tower of "
                f"{tuple(text.positional_embedding.shape)}; AnomalyCLIP wants OpenAI's ViT-L-14-336"
            )
        tokens = tokens + text.positional_embedding
        for number, block in enumerate(text.transformer.resblocks):
            if 1 <= number <= len(deep):
                own = deep[number - 1].half().to(tokens).unsqueeze(0)
                tokens = torch.cat([tokens[:, :1], own, tokens[:, 1 + own.shape[1] :]], dim=1)
            tokens = block(tokens, attn_mask=text.attn_mask)
        last = int(learner[f"tokenized_prompts_{sign}"].reshape(-1).argmax())
        projection = text.text_projection
        found = text.ln_final(tokens)[0, last]
        columns.append(projection(found) if isinstance(projection, torch.nn.Linear) else found @ projection)
    return functional.normalize(torch.stack(columns, dim=1).float(), dim=0)


def _deep_names(learner: dict[str, Tensor]) -> list[str]:
    return [name for name in learner if name.startswith("compound_prompts_text.")]


def bilinear_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1 + n, width) -> (1 + h * w, width): bilinear without antialiasing, as AnomalyCLIP enlarges them."""
    edge = round((len(positions) - 1) ** 0.5)
    planes = positions[1:].float().reshape(1, edge, edge, -1).permute(0, 3, 1, 2)
    enlarged = functional.interpolate(planes, grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1].float(), enlarged.flatten(2)[0].T])


def smoothed(planes: Tensor, deviation: float) -> Tensor:
    """(B, S, S) -> the same under a Gaussian of `deviation` px, cut off at four of them, edges mirrored."""
    edge = 2 * int(4.0 * deviation + 0.5) + 1
    arrays = [
        cv2.GaussianBlur(plane, (edge, edge), deviation, borderType=cv2.BORDER_REFLECT)
        for plane in planes.float().cpu().numpy()
    ]
    return torch.from_numpy(np.stack(arrays)).to(planes.device)


def _clip_of(spec: PeerSpec, device: torch.device) -> tuple[DenseClip, Bundle]:
    bundle = open_bundle(spec.bundle)
    bundle.verify()
    # as each was trained and published, whatever the layers in this bundle were trained under
    activation = "quickgelu" if spec.method == "anomalyclip" else "gelu"
    settings = bundle.manifest.clip.model_copy(update={"activation": activation})
    clip = DenseClip(settings, bundle.folder)
    check_tower(clip.model.visual, f"--peer {spec.method}={spec.bundle}")
    clip.load(bundle.path(bundle.manifest.clip.checkpoint))
    clip.to(device).float()
    return clip, bundle


def _published_positions(clip: DenseClip, bundle: Bundle) -> Tensor:
    """The image tower's position embeddings before they were brought to the bundle's input size."""
    state = convert_state_dict(clip.model, read_state_dict(bundle.path(bundle.manifest.clip.checkpoint)))
    positions: Tensor = state["visual.positional_embedding"]
    return positions


def _normalised(clip: DenseClip, pixels: Tensor) -> Tensor:
    return clip.normalise(squash(pixels, clip.input_size))


def _grid(places: Tensor, visual: Any) -> Tensor:
    """(B, n, ...) -> (B, h, w, ...)."""
    return places.reshape(len(places), *visual.grid_size, *places.shape[2:])


def _enlarged(planes: Tensor, size: int) -> Tensor:
    """(B, h, w) -> (B, S, S)."""
    return functional.interpolate(planes.unsqueeze(1), (size, size), mode="bilinear", align_corners=False).squeeze(1)


def _dbscan() -> Any:
    try:
        return import_module("sklearn.cluster").DBSCAN
    except ImportError as error:
        raise ConfigError("--peer sdp needs scikit-learn: pip install 'flawline[peers]'") from error
