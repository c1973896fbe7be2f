"""Trains the embedded SAM: neck, prompt encoder, mask decoder, and the trunk's first stages, once CLIP's.

Three phases. First shapes that are in no picture, asked for by boxes, so that the decoder learns to read a prompt
before it learns what pictures are like (else it finds whatever is conspicuous, and never looks at the prompt).
Then real targets in windows of the frame, as SAM was trained: prompts drawn at random, the last logits and points
where the mask was wrong in further rounds; of three masks the best one learns, and the scores learn every mask's
IoU. Last whole frames, where part of the prompts are the product's own: CLIP's map through PPG, then the cascade.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.models.refine import MaskRefiner
from flawline.models.sam import own_state
from flawline.models.sam_small import LITE0_STRIDE
from flawline.models.training.augment import photometric, reframe
from flawline.models.training.bundle_folder import SAM_SETTINGS
from flawline.models.training.pictures import Pictures
from flawline.models.training.sam_prompts import (
    CELL,
    Prompts,
    Rng,
    Target,
    Window,
    draw_shape,
    draw_target,
    worn,
)

ROUNDS = 4
TRUNK_SHARE = 0.2  # of the rate, in the trunk
LIT = 0.5  # share of the windows whose light, colour, blur and noise are changed
POINT_SHARE = 0.3  # weight of the loss at the points
ProductPrompts = Callable[[int], tuple[Tensor, Tensor, Tensor] | None]


@dataclass(frozen=True)
class SamSchedule:
    """How long and how fast."""

    shapes: int = 1000  # steps
    windows: int = 2500  # steps
    frames: int = 200  # steps
    window_cells: int = 8  # a window's edge; a cell is 32 px of the frame
    window_batch: int = 16
    frame_batch: int = 8
    threads: int = 2  # each takes its share of a batch
    rate: float = 8e-4
    balance: float = 0.5  # weight of the balanced term at the start
    bfloat16: bool = False  # products of matrices; a third quicker where the processor has them (avx512_bf16, amx)
    seed: int = 11
    checkpoint_every: int = 500

    @property
    def steps(self) -> int:
        """Of all three phases."""
        return self.shapes + self.windows + self.frames

    def phase(self, step: int) -> str:
        """Which of the three a step belongs to."""
        return "shapes" if step < self.shapes else "windows" if step < self.shapes + self.windows else "frames"

    def rate_at(self, step: int) -> float:
        """A short rise at the start and after the shapes, and a cosine down to nothing."""
        if step < self.shapes:
            return self.rate * min(1.0, (step + 1) / 50)
        done = step - self.shapes
        left = 0.5 * (1 + math.cos(math.pi * done / (self.windows + self.frames)))
        return self.rate * min(1.0, (done + 1) / 50) * (0.01 + 0.99 * left)

    def balance_at(self, step: int) -> float:
        """Weight of the balanced term: it leads away from "nothing", but lets masks of small things grow too large."""
        return self.balance * max(0.0, 1.0 - step / (0.4 * self.steps))


class WindowRefiner(MaskRefiner):
    """Decodes windows of SAM's frame: positions stay those of the whole frame."""

    def __init__(self, sam: Any) -> None:
        super().__init__(sam)
        height, width = sam.prompt_encoder.image_embedding_size
        self._all_positions = self._image_positions.view(height, width, -1)

    def look_at(self, windows: list[Window]) -> None:
        """From now on row b of a batch is windows[b]."""
        parts = []
        for window in windows:
            rows, columns = (slice(side.start // LITE0_STRIDE, side.stop // LITE0_STRIDE) for side in window.pixels())
            parts.append(self._all_positions[rows, columns].flatten(0, 1))
        self._image_positions = torch.stack(parts)


def mask_losses(logits: Tensor, truth: Tensor, balance: float) -> Tensor:
    """SAM's 20 focal + dice, and `balance` of a cross-entropy in which inside and outside count the same, per mask.

    (B, m, h, w), (B, h, w) -> (B, m).
    """
    target = truth.unsqueeze(1).expand_as(logits)
    cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    true_class = target * probability + (1 - target) * (1 - probability)
    focal = ((0.25 * target + 0.75 * (1 - target)) * (1 - true_class) ** 2 * cross).mean(dim=(2, 3))
    overlap = (2 * (probability * target).sum(dim=(2, 3)) + 1) / (
        probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1
    )
    losses = 20.0 * focal + (1.0 - overlap)
    if balance:
        inside = (cross * target).sum(dim=(2, 3)) / target.sum(dim=(2, 3)).clamp_min(1.0)
        outside = (cross * (1 - target)).sum(dim=(2, 3)) / (1 - target).sum(dim=(2, 3)).clamp_min(1.0)
        losses = losses + balance * (inside + outside)
    return losses


def point_loss(prompts: Prompts, logits: Tensor) -> Tensor:
    """Cross-entropy of every mask at the points that are given: an answer that leaves out a positive point or holds a
    negative one is wrong there, however little that is of the whole mask."""
    agreed = functional.softplus(-prompts.point_logits(logits)).mean(dim=1)
    present = prompts.present.float()  # a copy: the prompts are changed in place before gradients are taken
    return (agreed * present).sum() / present.sum().clamp_min(1.0)


def mask_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """IoU of logits above zero with a truth above one half: (B, m, h, w), (B, h, w) -> (B, m)."""
    found, wanted = logits > 0, (truth > 0.5).unsqueeze(1)
    union = (found | wanted).sum(dim=(2, 3)).clamp_min(1)
    return (found & wanted).sum(dim=(2, 3)) / union


def sam_parameters(sam: Any) -> list[Tensor]:
    """What is trained: everything but the deep part of the trunk, which is CLIP's too."""
    modules = (sam.image_encoder.neck, sam.prompt_encoder, sam.mask_decoder)
    return [weight for module in modules for weight in module.parameters()] + trunk_parameters(sam)


def trunk_parameters(sam: Any) -> list[Tensor]:
    """The trunk's own part: the stem and the stages down to stride 16. Batch norms keep their statistics."""
    trunk = sam.image_encoder.trunk
    modules = (trunk.conv_stem, trunk.bn1, *trunk.blocks[: SAM_SETTINGS.own_stages])
    return [weight for module in modules for weight in module.parameters()]


def train_sam(
    sam: Any,
    pictures: Pictures,
    schedule: SamSchedule,
    folder: Path,
    say: Callable[[str], None],
    validate: Callable[[], dict[str, float]],
    product_prompts: ProductPrompts,
) -> None:
    """Train in place, going on from the checkpoint in `folder` where there is one.

    `product_prompts` gives a picture's points, labels and which are present as PPG makes them, or None where
    CLIP sees nothing; in whole frames every third target takes them.
    """
    torch.manual_seed(schedule.seed)
    sam.requires_grad_(False)
    weights = sam_parameters(sam)
    for weight in weights:
        weight.requires_grad_(True)
    own = {id(weight) for weight in trunk_parameters(sam)}
    groups = [
        {"params": [weight for weight in weights if id(weight) not in own], "share": 1.0},
        {"params": [weight for weight in weights if id(weight) in own], "share": TRUNK_SHARE, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.01)
    everything, own_names = sam.state_dict(), own_state(sam, SAM_SETTINGS)
    state = {name: everything[name] for name in own_names if everything[name].is_floating_point()}
    average = {name: value.clone() for name, value in state.items()}
    checkpoint = folder / "sam-training.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        sam.load_state_dict(saved["weights"], strict=False)
        optimiser.load_state_dict(saved["optimiser"])
        average = saved["average"]
        say(f"sam: going on from step {start}")
    threads = schedule.threads
    refiners = [WindowRefiner(sam) for _ in range(threads)]
    pool, ahead = ThreadPoolExecutor(threads, "share"), ThreadPoolExecutor(1, "draw")
    drawing = ahead.submit(draw_batch, pictures, schedule, start, product_prompts)
    began = time.monotonic()
    seen: list[list[float]] = []
    for step in range(start, schedule.steps):
        images, targets = drawing.result()
        drawing = ahead.submit(draw_batch, pictures, schedule, step + 1, product_prompts)
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step) * group["share"]
        work = []
        for place, refiner in enumerate(refiners):
            part = images[place::threads], targets[place::threads]
            rng = np.random.default_rng((schedule.seed, step, place))
            rounds = 1 if schedule.phase(step) == "shapes" else ROUNDS - 1
            if schedule.phase(step) == "frames":
                rounds = ROUNDS
            work.append(pool.submit(step_gradients, sam, refiner, *part, rng, rounds, schedule, step))
        made = [future.result() for future in work]
        for weight, *shares in zip(weights, *(gradients for gradients, _ in made), strict=True):
            weight.grad = sum(shares[1:], shares[0]) / threads
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        keep = min(0.998, (step + 1) / (step + 20))
        for name, value in state.items():
            average[name].lerp_(value, 1 - keep)
        seen.append([sum(figures) / threads for figures in zip(*(figures for _, figures in made), strict=True)])
        done = step + 1
        if done % 100 == 0 or schedule.phase(done) != schedule.phase(step):
            loss_mean, *iou_means = np.mean(seen, axis=0)
            shown = " ".join(f"{value:.3f}" for value in iou_means)
            pace = f"{(done - start) / (time.monotonic() - began):.2f} steps/s"
            where = f"sam step {done}/{schedule.steps} {schedule.phase(step)}"
            say(f"{where} loss {loss_mean:.3f} iou by round {shown} {pace}")
            seen.clear()
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            saved = {"step": done, "weights": state, "optimiser": optimiser.state_dict(), "average": average}
            torch.save(saved, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            held = {name: value.clone() for name, value in state.items()}
            sam.load_state_dict(average, strict=False)
            say(f"sam step {done} unseen families: " + " ".join(f"{k} {v:.3f}" for k, v in validate().items()))
            if done < schedule.steps:
                sam.load_state_dict(held, strict=False)
    pool.shutdown()
    ahead.shutdown()
    sam.load_state_dict(average, strict=False)
    sam.requires_grad_(False)


def draw_batch(
    pictures: Pictures, schedule: SamSchedule, step: int, product_prompts: ProductPrompts
) -> tuple[list[NDArray[np.uint8]], list[Target]]:
    """Windows (E, E, 3) of pictures and a target in each, the same ones for the same step.

    Windows are of pictures cropped, turned and lit at random: an answer learnt by heart is of no use then.
    """
    rng = np.random.default_rng((schedule.seed, step))
    phase = schedule.phase(step)
    frame = pictures.image.shape[1]
    cells = frame // CELL if phase == "frames" else schedule.window_cells
    images: list[NDArray[np.uint8]] = []
    targets: list[Target] = []
    while len(images) < (schedule.frame_batch if phase == "frames" else schedule.window_batch):
        row = int(rng.integers(len(pictures)))
        image, kinds, parts = (np.asarray(plane[row]) for plane in (pictures.image, pictures.kinds, pictures.parts))
        target: Target | None = None
        if phase == "shapes":
            target = draw_shape(rng, frame // CELL, cells)
        elif phase == "frames" and len(images) % 3 == 0 and kinds.any():
            target = product_target(product_prompts(row), kinds)
        if target is None:
            image, (kinds, parts) = reframe(rng, image, [kinds, parts], frame)
            target = draw_target(rng, kinds, parts, cells)
        if target is not None:
            shown = image[target.window.pixels()]
            images.append(photometric(rng, shown) if phase == "windows" and rng.random() < LIT else shown)
            targets.append(target)
    return images, targets


def product_target(made: tuple[Tensor, Tensor, Tensor] | None, kinds: NDArray[np.uint8]) -> Target | None:
    """All defects of a picture, asked for as PPG asks for them."""
    if made is None:
        return None
    points, labels, present = (tensor.numpy() for tensor in made)
    return Target(Window(0, 0, kinds.shape[0] // CELL), kinds > 0, points, labels, present, None)


def step_gradients(
    sam: Any,
    refiner: WindowRefiner,
    images: list[NDArray[np.uint8]],
    targets: list[Target],
    rng: Rng,
    rounds: int,
    schedule: SamSchedule,
    step: int,
) -> tuple[list[Tensor], list[float]]:
    """Gradients of one share of a batch; its loss and the IoU of every round. On one thread of torch's."""
    torch.set_num_threads(1)
    refiner.look_at([target.window for target in targets])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    levels = sam.image_encoder.trunk_features((pixels - sam.pixel_mean) / sam.pixel_std)
    with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
        embedding = sam.image_encoder.neck(levels)
        loss, ious = sam_step(refiner, embedding, targets, rng, rounds, schedule.balance_at(step))
    weights = sam_parameters(sam)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    filled = [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    return filled, [float(loss.detach()), *ious]


def sam_step(
    refiner: MaskRefiner, embedding: Tensor, targets: list[Target], rng: Rng, rounds: int, balance: float
) -> tuple[Tensor, list[float]]:
    """The prompt; then with the last logits; then with points where it was wrong (some already earlier); then with the
    box of the mask."""
    edge = 4 * embedding.shape[-1]
    masks = torch.from_numpy(np.stack([target.mask for target in targets])).float()
    truth = functional.interpolate(masks.unsqueeze(1), (edge, edge), mode="area").squeeze(1)
    prompts = Prompts.of(targets)
    total = torch.zeros(())
    ious: list[float] = []
    previous: Tensor | None = None
    for number in range(rounds):
        logits, scores = refiner.decode(
            embedding, prompts.points, prompts.labels, prompts.present, prompts.boxes, prompts.boxed, previous
        )
        losses, real = mask_losses(logits, truth, balance), mask_iou(logits, truth)
        best = losses[:, 1:].min(dim=1).values
        total = total + best.mean() + 0.5 * losses[:, 0].mean() + functional.mse_loss(scores, real.float())
        total = total + POINT_SHARE * point_loss(prompts, logits)
        rows, chosen = torch.arange(len(targets)), scores[:, 1:].argmax(dim=1) + 1
        ious.append(float(real[rows, chosen].float().mean()))
        picked = logits[rows, chosen].detach()
        if number == 0 and rounds > 1:
            for row in range(len(targets)):
                if rng.random() < 0.2:  # a mask given from outside counts too
                    picked[row] = worn(rng, truth[row])
            prompts.correct(rng, picked, truth, 0.4)
        elif number == 1:
            prompts.correct(rng, picked, truth, 0.8)
        elif number == 2:
            prompts.box_in(picked)
        previous = picked.unsqueeze(1)
    return total / rounds, ious
