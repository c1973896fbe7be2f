"""Training of the linear layers on CLIP's frozen features: APRIL-GAN's losses, optimiser and data (section 4.1.2).

The training set is the test split of a data set other than the one evaluated on, good and defective pictures
with their masks. What is drawn depends on the seed, the epoch and the step alone, so a run that was
interrupted ends with the same weights as one that was not.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.bundle import Bundle
from flawline.models.checkpoints import metadata
from flawline.models.clip import DenseClip
from flawline.models.datasets import Category, Kind, object_words
from flawline.models.feature_cache import FeatureCache
from flawline.models.ground_truth import resize_mask, truth
from flawline.models.localise import AdapterLocaliser
from flawline.models.mosaic import draw_four, mosaic
from flawline.models.text import text_features
from flawline.models.training.losses import published_loss
from flawline.models.words import Words


@dataclass(frozen=True)
class TrainingPlan:
    """What decides the weights. The defaults are the paper's; epochs and mosaic depend on the data set."""

    epochs: int
    mosaic: float  # share of samples replaced by a mosaic
    batch: int = 16
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    seed: int = 111

    @classmethod
    def of(cls, kind: Kind, **given: Any) -> "TrainingPlan":
        """MVTec AD: 3 epochs, mosaic 0.2. VisA and others: 15 epochs, none. `given` values that are not None
        replace the defaults."""
        defaults = {"epochs": 3, "mosaic": 0.2} if kind == "mvtec" else {"epochs": 15, "mosaic": 0.0}
        return cls(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


@dataclass(frozen=True)
class Progress:
    """Said after every step."""

    epoch: int
    step: int
    steps: int  # of the whole run
    loss: float
    seconds_left: float


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    """A file as it is now: one that was changed since is another."""
    if path is None:
        return None
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


class AdapterTrainer:
    """Holds frozen CLIP, the linear layers and the data of one run."""

    def __init__(
        self,
        bundle: Bundle,
        kind: Kind,
        categories: Sequence[Category],
        plan: TrainingPlan,
        device: torch.device,
        cache: Path | None,
    ) -> None:
        """Loads CLIP. Raises BundleError, ConfigError where no picture has a mask."""
        manifest = bundle.manifest
        self.plan = plan
        self._categories = {category.name: category for category in categories}
        self.samples = [
            (category.name, sample) for category in categories for sample in category.test if sample.has_pixels
        ]
        if not any(sample.defective for _, sample in self.samples):
            raise ConfigError("train-adapter: no defective picture with a mask is in the chosen categories")
        self.clip = DenseClip(manifest.clip, bundle.folder)
        self.clip.load(bundle.path(manifest.clip.checkpoint))
        self.clip.to(device)
        identity = bundle.checksum(manifest.clip.checkpoint)
        self.features = FeatureCache(self.clip, identity, cache)
        self._direction = {}
        for name in self._categories:
            words = Words.of(Recipe(object=object_words(kind, name)), manifest.prompts)
            pair = text_features(self.clip, words, identity).pair
            self._direction[name] = pair[:, 1] - pair[:, 0]
        settings = manifest.adapter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.adapter = AdapterLocaliser(
                self.clip.tap_channels(),
                self.clip.embed_dim,
                settings.temperature if settings else 100.0,
                settings.centred if settings else False,
            )
        self.adapter.to(device).train()
        self.optimiser = torch.optim.Adam(self.adapter.parameters(), lr=plan.learning_rate, betas=plan.betas)
        self._device = device
        self.done = 0  # steps
        known = [
            asdict(plan),
            identity,
            self.clip.activation,
            manifest.model_dump(mode="json"),  # taps, input, words, temperature
            [(name, *map(_stamp, (sample.image, sample.mask))) for name, sample in self.samples],
        ]
        self.signature = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """The last, smaller batch counts."""
        return math.ceil(len(self.samples) / self.plan.batch)

    def train(self, report: Callable[[Progress], None], save: Callable[[], None], save_every_s: float = 60.0) -> None:
        """Run to the end from wherever the run stands; `save` is called now and then and at the end."""
        total = self.plan.epochs * self.steps_per_epoch
        started, first, saved = time.monotonic(), self.done, time.monotonic()
        while self.done < total:
            epoch, step = divmod(self.done, self.steps_per_epoch)
            order = np.random.default_rng([self.plan.seed, epoch]).permutation(len(self.samples))
            chosen = order[step * self.plan.batch : (step + 1) * self.plan.batch]
            loss = self._step(epoch, [int(number) for number in chosen])
            if not math.isfinite(loss):
                raise ConfigError(f"train-adapter: the loss is {loss} at step {self.done}: use a lower --lr")
            self.done += 1
            left = (time.monotonic() - started) / (self.done - first) * (total - self.done)
            report(Progress(epoch + 1, self.done, total, loss, left))
            if time.monotonic() - saved > save_every_s:
                save()
                saved = time.monotonic()
        save()

    def _step(self, epoch: int, numbers: Sequence[int]) -> float:
        drawn = [self._draw(epoch, number) for number in numbers]
        taps = [torch.cat(group) for group in zip(*(taps for taps, _ in drawn), strict=True)]
        direction = torch.stack([self._direction[self.samples[number][0]] for number in numbers])  # (B, D)
        marked = torch.from_numpy(np.stack([mask for _, mask in drawn])).to(self._device).float()
        loss = torch.stack([published_loss(one, marked) for one in self._maps(taps, direction)]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return float(loss.detach())

    def _draw(self, epoch: int, number: int) -> tuple[list[Tensor], Any]:
        """Taps and (S, S) truth of sample `number`, or of a mosaic of its class."""
        name, sample = self.samples[number]
        rng = np.random.default_rng([self.plan.seed, epoch, number])
        size = self.clip.input_size
        if rng.random() < self.plan.mosaic:
            usable = [one for one in self._categories[name].test if one.has_pixels]
            picture, marked = mosaic(draw_four(usable, rng))
            return self.features.encode(picture), resize_mask(marked, (size, size))
        return self.features(sample.image), truth(sample, (size, size), (size, size))

    def _maps(self, taps: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
        """The localiser's own map per tap, with another text for every picture of the batch."""
        size = self.clip.input_size
        maps = []
        for number, features in enumerate(taps):
            embedded = self.adapter.embed(number, features)  # (B, h, w, D)
            difference = torch.einsum("bhwd,bd->bhw", embedded, direction) * self.adapter.temperature
            enlarged = functional.interpolate(
                difference.unsqueeze(1), (size, size), mode="bilinear", align_corners=True
            )
            maps.append(enlarged.squeeze(1).sigmoid())
        return maps

    def save_state(self, path: Path) -> None:
        """Everything that is needed to go on."""
        partial = path.with_name(f"{path.name}.partial")
        state = {
            "signature": self.signature,
            "done": self.done,
            "adapter": self.adapter.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> bool:
        """Go on from a saved state; False where there is none of this very run."""
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ConfigError(f"{path}: is not a state that training can go on from; delete it: {error}") from error
        if state.get("signature") != self.signature:
            return False
        self.adapter.load_state_dict(state["adapter"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.done = int(state["done"])
        return True

    def write(self, safetensors: Path, april_gan: Path) -> None:
        """The layers as fc.N.weight and fc.N.bias, in a bundle's format and in APRIL-GAN's checkpoint.

        Each is replaced as a whole, and none before both could be written. Raises ConfigError naming the file.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.adapter.state_dict().items()}
        about = {"format": "pt", "plan": json.dumps(asdict(self.plan)), "activation": self.clip.activation}
        theirs = io.BytesIO()
        torch.save({"trainable_linearlayer": state, "activation": self.clip.activation}, theirs)
        _replace({safetensors: save(state, metadata=about), april_gan: theirs.getvalue()})


def refuse_to_overwrite(out: Path, files: Sequence[Path]) -> None:
    """Raises ConfigError where one of the `files` that --out stands for is there and no earlier run wrote it.

    APRIL-GAN publishes layers under names such as visa_pretrained.pth. What `AdapterTrainer.write` wrote names its
    activation.
    """
    for file in files:
        if file.exists() and "activation" not in metadata(file):
            raise ConfigError(
                f"--out {out}: {file} is there already, and train-adapter did not write it; give another name: "
                f"{' and '.join(one.name for one in files)} would be replaced"
            )


def _replace(contents: Mapping[Path, bytes]) -> None:
    partials = {path: path.with_name(f"{path.name}.partial") for path in contents}
    path = None
    try:
        for path, content in contents.items():
            with partials[path].open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        for partial in partials.values():
            with contextlib.suppress(OSError):  # the error that is on its way says more
                partial.unlink(missing_ok=True)
