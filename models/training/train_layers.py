"""Trains pyramid and linear layers on against the text tower's own sentences; trunk and words stay as they are.

This is the paper's way (section 4.1.2): CLIP frozen, layers trained so that a place's features lie near the words
for its state. The learnt directions that the image side started from (train_clip.py) are only nearly where the text
tower has put its sentences; here the sentences themselves are the targets, those of single kinds too. Whole pictures
count as well: the highest places of a good one are held down, those of a bad one up.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flawline.camera.synthetic import DEFECT_KINDS, STATE_WORDS
from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.text import mean_direction
from flawline.models.training.batches import Batch, batches
from flawline.models.training.loop import Loop, train
from flawline.models.training.losses import finishing_loss, picture_loss
from flawline.models.training.pictures import Pictures
from flawline.models.training.train_clip import training_loss
from flawline.models.words import STATES_ABNORMAL, STATES_NORMAL, TEMPLATES

PLAIN_OBJECTS = ("object", "part", "product", "surface", "workpiece", "item")
PICTURE_SHARE = 0.5  # weight of the loss of whole pictures


@dataclass(frozen=True)
class LayerSchedule:
    """How long and how fast; sizes are edges of the training crop, px."""

    steps: int = 2400
    batch: int = 8
    sizes: tuple[int, ...] = (288, 352, 384)
    rate: float = 6e-4
    seed: int = 13
    checkpoint_every: int = 400
    threads: int = 2


class SentenceDirections:
    """Directions in the joint space from normal to abnormal, and from normal to each kind, for many objects."""

    def __init__(self, clip: DenseClip, objects: list[str], seed: int, templates: int = 6) -> None:
        chance = random.Random(seed)

        def mean(states: tuple[str, ...], name: str) -> Tensor:
            chosen = chance.sample(TEMPLATES, templates)
            return mean_direction(clip, [t.format(state.format(name)) for state in states for t in chosen])

        names = [*PLAIN_OBJECTS, *objects]
        normal = torch.stack([mean(STATES_NORMAL, name) for name in names])
        self._general = torch.stack([mean(STATES_ABNORMAL, name) for name in names]) - normal
        special = []
        for kind in DEFECT_KINDS:
            places = [chance.randrange(len(names)) for _ in range(24)]
            words = [(chance.choice(STATE_WORDS[kind]),) for _ in places]
            special.append(
                torch.stack([mean(w, names[place]) - normal[place] for w, place in zip(words, places, strict=True)])
            )
        self._special = torch.stack(special)  # (kinds, 24, D)

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, D) general, (B, D) of the asked kinds; words by the numbers drawn for each picture."""
        general = self._general[batch.chance % len(self._general)]
        return general, self._special[batch.asked, batch.chance % self._special.shape[1]]


def train_layers(
    clip: DenseClip,
    adapter: AdapterLocaliser,
    pictures: Pictures,
    schedule: LayerSchedule,
    folder: Path,
    say: Callable[[str], None],
    validate: Callable[[], dict[str, float]],
) -> None:
    """Train the pyramid and `adapter` in place, going on from the checkpoint in `folder` where there is one."""
    torch.manual_seed(schedule.seed)
    say("layers: encoding sentences")
    directions = SentenceDirections(clip, sorted({entry["object"] for entry in pictures.words}), schedule.seed)
    trunk: Any = clip.model.visual.trunk
    modules = torch.nn.ModuleDict({"laterals": trunk.laterals, "smooth": trunk.smooth, "adapter": adapter})
    clip.model.requires_grad_(False)
    modules.requires_grad_(True)
    clip.model.visual.to(memory_format=torch.channels_last)
    clip.eval()

    def loss(batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            levels = trunk.backbone_features(batch.images)
        taps = trunk.pyramid(levels)
        value, shown, parts = training_loss(taps, adapter, *directions.of(batch), batch, finishing_loss)
        whole = picture_loss(shown, batch.truths(shown.shape[-1])[0])
        return value + PICTURE_SHARE * whole, parts | {"picture": float(whole.detach())}

    def rate_share(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / schedule.steps)))

    train(
        Loop(
            "layers",
            schedule.steps,
            min(schedule.threads, schedule.batch),
            folder / "layers-training.pt",
            schedule.checkpoint_every,
        ),
        modules,
        [{"params": list(modules.parameters()), "lr": schedule.rate, "top": schedule.rate}],
        partial(batches, pictures, schedule.batch, schedule.sizes, schedule.seed),
        rate_share,
        loss,
        say,
        validate,
    )
    modules.requires_grad_(False)
