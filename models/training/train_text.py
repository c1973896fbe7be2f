"""Trains the text tower towards the directions that the image side has learnt, and the projection of whole pictures.

"Locked-image tuning" the other way round: a sentence's target is the direction of its state, to which the meaning
of its object adds a part that lies across all states. A state's words thus mean the same for every object, and an
object that never stood in a caption still has a place, that of its tokens' published embeddings.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flawline.camera.synthetic import DEFECT_KINDS, STATE_WORDS, UNSEEN_DEFECT_KINDS
from flawline.camera.words import BAD_WORDS, GOOD_WORDS
from flawline.camera.words import TEMPLATES as CAPTION_TEMPLATES
from flawline.models.clip import DenseClip
from flawline.models.training.losses import contrastive_loss
from flawline.models.training.pictures import Pictures
from flawline.models.training.train_clip import Anchors
from flawline.models.words import STATES_ABNORMAL, STATES_NORMAL, TEMPLATES

OBJECT_SHARE = 0.6  # length of the object's part of a target against the state's
NORMAL, ABNORMAL = 0, 1


@dataclass(frozen=True)
class TextSchedule:
    """How long and how fast."""

    steps: int = 1000
    batch: int = 128
    rate: float = 1e-3
    head_steps: int = 1500
    seed: int = 3


def state_sentences() -> list[tuple[str, int]]:
    """Every state's sentence with {} and the number of the anchor it belongs to.

    Kinds that are kept from training count as abnormal in general: no picture has taught their own direction.
    """
    states = [(state, NORMAL) for state in {*STATES_NORMAL, *GOOD_WORDS}]
    states += [(state, ABNORMAL) for state in {*STATES_ABNORMAL, *BAD_WORDS}]
    for place, kind in enumerate(DEFECT_KINDS):
        anchor = ABNORMAL if kind in UNSEEN_DEFECT_KINDS else 2 + place
        states += [(state, anchor) for state in STATE_WORDS[kind]]
    return sorted(states)


class Objects:
    """Names of things: those of the pictures, and words of the vocabulary at random; and where they lie."""

    def __init__(self, clip: DenseClip, pictures: Pictures, anchors: Tensor) -> None:
        self._tokenizer = clip.tokenizer
        self._table: Tensor = clip.model.text.token_embedding.weight
        self.known = sorted({entry["object"] for entry in pictures.words} | {"object", "part", "product", "surface"})
        self.words = [
            text.removesuffix("</w>")
            for text in self._tokenizer.encoder
            if text.endswith("</w>") and text[:-4].isascii() and text[:-4].isalpha() and 3 <= len(text) - 4 <= 12
        ]
        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(self._table.shape[1], anchors.shape[1], generator=generator) / math.sqrt(anchors.shape[1])
        basis = torch.linalg.svd(anchors, full_matrices=False).Vh
        self._across = spread - spread @ basis.T @ basis

    def draw(self, chance: random.Random) -> str:
        """A known name, or one or two words of the vocabulary."""
        if chance.random() < 0.6:
            return chance.choice(self.known)
        return " ".join(chance.choice(self.words) for _ in range(chance.choice((1, 1, 2))))

    def direction(self, names: list[str]) -> Tensor:
        """(n, D) unit vectors across all anchors."""
        means = [self._table[torch.tensor(self._tokenizer.encode(name))].mean(dim=0) for name in names]
        return functional.normalize(torch.stack(means) @ self._across, dim=-1)


def train_text(
    clip: DenseClip,
    anchors: Anchors,
    pictures: Pictures,
    schedule: TextSchedule,
    say: Callable[[str], None],
) -> None:
    """Train the text tower in place; its token table stays as it is."""
    torch.manual_seed(schedule.seed)
    chance = random.Random(schedule.seed)
    text = clip.model.text
    directions = anchors().detach()
    objects = Objects(clip, pictures, directions)
    states = state_sentences()
    by_anchor: dict[int, list[str]] = {}
    for state, anchor in states:
        by_anchor.setdefault(anchor, []).append(state)
    text.requires_grad_(True)
    text.token_embedding.requires_grad_(False)
    weights = [weight for weight in text.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.01)
    began = time.monotonic()
    for step in range(schedule.steps):
        for group in optimiser.param_groups:
            fall = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
            group["lr"] = schedule.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * fall)
        sentences, names, wanted = [], [], []
        for _ in range(schedule.batch):
            # as many normal and general sentences as of all kinds together
            anchor = chance.choice((NORMAL, ABNORMAL)) if chance.random() < 0.5 else chance.choice(list(by_anchor))
            name = objects.draw(chance)
            phrase = chance.choice(by_anchor[anchor]).format(name)
            templates = TEMPLATES if chance.random() < 0.7 else CAPTION_TEMPLATES
            sentences.append(chance.choice(templates).format(phrase))
            names.append(name)
            wanted.append(anchor)
        chosen = torch.tensor(wanted)
        target = functional.normalize(directions[chosen] + OBJECT_SHARE * objects.direction(names), dim=-1)
        encoded = functional.normalize(text(clip.tokenizer(sentences)), dim=-1)
        near = (1.0 - (encoded * target).sum(dim=-1)).mean()
        state_loss = functional.cross_entropy(20.0 * encoded @ directions.T, chosen)
        loss = near + 0.1 * state_loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            right = ((encoded @ directions.T).argmax(dim=1) == chosen).float().mean()
            rate = (step + 1) / (time.monotonic() - began)
            say(
                f"text step {step + 1}/{schedule.steps} distance {float(near.detach()):.4f} "
                f"state right {float(right):.3f} {rate:.1f} steps/s"
            )
    text.requires_grad_(False)


def train_projection(
    clip: DenseClip, pictures: Pictures, schedule: TextSchedule, say: Callable[[str], None], count: int = 1000
) -> None:
    """Train the projection of pooled image features by contrast with the captions of `count` pictures."""
    torch.manual_seed(schedule.seed)
    visual: Any = clip.model.visual
    rows = range(min(count, len(pictures)))
    with torch.no_grad():
        pooled = []
        for start in range(0, len(rows), 8):
            images = torch.from_numpy(np.asarray(pictures.image[start : min(start + 8, len(rows))]))
            images = functional.interpolate(images.permute(0, 3, 1, 2).float(), (256, 256), mode="area")
            pooled.append(visual.trunk(clip.normalise(images).contiguous(memory_format=torch.channels_last)))
        features = torch.cat(pooled)
        captions = [pictures.words[row]["captions"] for row in rows]
        encoded = torch.stack([functional.normalize(clip.encode_text(four), dim=-1) for four in captions])
    projection = visual.head.proj
    scale = clip.model.logit_scale
    projection.requires_grad_(True)
    scale.requires_grad_(True)
    optimiser = torch.optim.AdamW([projection.weight, scale], lr=1e-3, weight_decay=0.01)
    for step in range(schedule.head_steps):
        chosen = torch.randint(len(rows), (256,))
        which = torch.randint(4, (256,))
        images = functional.normalize(projection(features[chosen]), dim=-1)
        loss = contrastive_loss(images, encoded[chosen, which], scale.exp().clamp_max(100))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if (step + 1) % 500 == 0:
            say(f"projection step {step + 1}/{schedule.head_steps} contrast {float(loss.detach()):.3f}")
    projection.requires_grad_(False)
    scale.requires_grad_(False)
