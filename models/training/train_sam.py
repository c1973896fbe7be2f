"""Trains the embedded SAM: neck, prompt encoder and mask decoder over the trunk that CLIP has already trained.

As SAM was trained: prompts drawn at random (points, a box, both), then rounds in which the last logits go back in
with further points where the mask was wrong; of three masks the best one learns, and the scores learn every mask's
IoU. Part of the prompts are those of the product itself: CLIP's map through PPG, then the cascade's three levels.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.models.refine import MaskRefiner
from flawline.models.training.pictures import Pictures

Rng = np.random.Generator
POINTS = 6  # places for points in a training prompt
ROUNDS = 4


@dataclass(frozen=True)
class SamSchedule:
    """How long and how fast; `pictures` trunk features at once in memory."""

    steps: int = 1250
    batch: int = 8
    threads: int = 2  # each takes its share of a batch
    rate: float = 1e-3
    seed: int = 11
    checkpoint_every: int = 500


@dataclass
class Target:
    """What a prompt stands for: the wanted mask and the prompt's first round, in SAM's frame."""

    mask: NDArray[np.bool_]  # (P, P)
    points: NDArray[np.float32]  # (POINTS, 2) x, y
    labels: NDArray[np.int64]  # (POINTS,)
    present: NDArray[np.bool_]  # (POINTS,)
    box: NDArray[np.float32] | None  # (4,)


def draw_target(rng: Rng, kinds: NDArray[np.uint8], parts: NDArray[np.uint8]) -> Target | None:
    """All defects together, one defect, or one normal structure, and a prompt for it; None where there is none."""
    choice = rng.random()
    defects = kinds > 0
    if choice < 0.45 and defects.any():
        mask = defects
    elif choice < 0.75 and defects.any():
        count, labels = cv2.connectedComponents(defects.astype(np.uint8), connectivity=8)
        mask = labels == int(rng.integers(1, count))
    else:
        names = np.unique(parts)
        names = names[names > 0]
        if not len(names):
            return None
        mask = parts == int(rng.choice(names))
    if mask.sum() < 12 or mask.mean() > 0.6:
        return None
    kind = rng.random()
    box = jittered_box(rng, mask) if kind < 0.35 else None
    if kind >= 0.2:
        positives = int(rng.integers(1, 4))
        negatives = int(rng.integers(0, 4)) if rng.random() < 0.75 else 0
    else:
        positives = negatives = 0
    points, labels, present = draw_points(rng, mask, positives, negatives)
    return Target(mask, points, labels, present, box)


def jittered_box(rng: Rng, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The mask's tight box, each edge moved by up to a tenth of its length."""
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), xs.max(), ys.max()], np.float32)
    reach = np.array([box[2] - box[0], box[3] - box[1]], np.float32) * 0.1
    moved: NDArray[np.float32] = box + rng.normal(0, 0.5, 4).astype(np.float32) * np.tile(reach, 2)
    return moved.clip(0, mask.shape[0] - 1)


def draw_points(
    rng: Rng, mask: NDArray[np.bool_], positives: int, negatives: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Points inside the mask, rather deep than at the edge, and points in the ring around it."""
    points = np.zeros((POINTS, 2), np.float32)
    labels = np.zeros(POINTS, np.int64)
    present = np.zeros(POINTS, bool)
    inside = np.argwhere(mask)
    if positives and rng.random() < 0.6:
        depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
        inside = np.argwhere(depth >= 0.5 * depth.max())
    for place in range(positives):
        points[place] = inside[rng.integers(len(inside))][::-1]
        labels[place], present[place] = 1, True
    if negatives:
        reach = int(rng.integers(5, 31)) | 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
        gap = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
        around = np.argwhere((cv2.dilate(gap, kernel) > 0) & (gap == 0))
        for place in range(3, 3 + negatives):
            if len(around):
                points[place], present[place] = around[rng.integers(len(around))][::-1], True
    return points, labels, present


class TrunkFeatures:
    """The frozen trunk's features of every picture, computed once, half precision, in memory."""

    def __init__(self, sam: Any, pictures: Pictures, say: Callable[[str], None]) -> None:
        began = time.monotonic()
        self._levels: list[list[Tensor]] = []
        with torch.no_grad():
            for start in range(0, len(pictures), 8):
                images = torch.from_numpy(np.asarray(pictures.image[start : start + 8])).permute(0, 3, 1, 2)
                normalised = sam.preprocess(images.float()).contiguous(memory_format=torch.channels_last)
                levels = sam.image_encoder.trunk_features(normalised)
                self._levels += [[level[row].half() for level in levels] for row in range(len(images))]
                if start % 800 == 0:
                    say(f"sam: trunk features of {start}/{len(pictures)} pictures, {time.monotonic() - began:.0f} s")

    def batch(self, rows: list[int]) -> list[Tensor]:
        """The four levels of these pictures, float32."""
        return [torch.stack([self._levels[row][level] for row in rows]).float() for level in range(4)]


def mask_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """SAM's 20 focal + dice, and a cross-entropy in which inside and outside count the same, per mask.

    (B, m, h, w), (B, h, w) -> (B, m). The last one is for defects of a few pixels, which the others leave at nothing.
    """
    target = truth.unsqueeze(1).expand_as(logits)
    cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    true_class = target * probability + (1 - target) * (1 - probability)
    focal = ((0.25 * target + 0.75 * (1 - target)) * (1 - true_class) ** 2 * cross).mean(dim=(2, 3))
    overlap = (2 * (probability * target).sum(dim=(2, 3)) + 1) / (
        probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1
    )
    inside = (cross * target).sum(dim=(2, 3)) / target.sum(dim=(2, 3)).clamp_min(1.0)
    outside = (cross * (1 - target)).sum(dim=(2, 3)) / (1 - target).sum(dim=(2, 3)).clamp_min(1.0)
    return 20.0 * focal + (1.0 - overlap) + 0.5 * (inside + outside)


def mask_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """IoU of logits above zero with a truth above one half: (B, m, h, w), (B, h, w) -> (B, m)."""
    found, wanted = logits > 0, (truth > 0.5).unsqueeze(1)
    union = (found | wanted).sum(dim=(2, 3)).clamp_min(1)
    return (found & wanted).sum(dim=(2, 3)) / union


def further_points(
    rng: Rng, logits: Tensor, truth: Tensor, scale: float, points: Tensor, labels: Tensor, present: Tensor
) -> None:
    """Where a place is free: a point where the mask is most wrong, in place."""
    wrong = ((logits > 0) != (truth > 0.5)).numpy()
    for row in range(len(points)):
        free = torch.nonzero(~present[row]).flatten()
        places = np.argwhere(wrong[row])
        if not len(free) or not len(places) or rng.random() < 0.3:
            continue
        y, x = places[rng.integers(len(places))]
        place = int(free[0])
        points[row, place] = torch.tensor([(x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5])
        labels[row, place] = int(truth[row, y, x] > 0.5)
        present[row, place] = True


def align_positions(sam: Any, gain: float = 2.0) -> None:
    """Start the attention between tokens and image with queries and keys projected alike and little else, in place.

    A point's position then finds the same position of the image from the first step on (the product of two Fourier
    encodings falls with their distance). From independent projections this alone takes longer than the whole
    training of a small SAM.
    """
    transformer = sam.mask_decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        torch.nn.init.zeros_(attention.q_proj.bias)
        torch.nn.init.zeros_(attention.k_proj.bias)
    prompts, decoder = sam.prompt_encoder, sam.mask_decoder
    with torch.no_grad():
        for table in (*prompts.point_embeddings, prompts.not_a_point_embed, prompts.no_mask_embed):
            table.weight.mul_(0.1)
        for table in (decoder.iou_token, decoder.mask_tokens):
            table.weight.mul_(0.3)
        sam.image_encoder.neck.norm2.weight.fill_(0.4)


def sam_parameters(sam: Any) -> list[Tensor]:
    """What is trained: everything but the trunk, which is CLIP's too."""
    modules = (sam.image_encoder.neck, sam.prompt_encoder, sam.mask_decoder)
    return [weight for module in modules for weight in module.parameters()]


def train_sam(
    sam: Any,
    pictures: Pictures,
    schedule: SamSchedule,
    folder: Path,
    say: Callable[[str], None],
    validate: Callable[[], dict[str, float]],
    product_prompts: Callable[[int], tuple[Tensor, Tensor, Tensor] | None] | None = None,
) -> None:
    """Train in place, going on from the checkpoint in `folder` where there is one.

    `product_prompts` gives a picture's points, labels and which are present as PPG makes them, or None where
    CLIP sees nothing; every third target takes them.
    """
    torch.manual_seed(schedule.seed)
    features = TrunkFeatures(sam, pictures, say)
    sam.requires_grad_(False)
    weights = sam_parameters(sam)
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights, lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.01)
    state = {name: value for name, value in sam.state_dict().items() if ".trunk." not in name}
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
    pool = ThreadPoolExecutor(threads, "share")
    began = time.monotonic()
    sums = np.zeros(ROUNDS + 1)
    for step in range(start, schedule.steps):
        rng = np.random.default_rng((schedule.seed, step))
        rate = schedule.rate * min(1.0, (step + 1) / 200)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        rows, targets = draw_batch(rng, pictures, schedule.batch, product_prompts)
        shares = [(rows[place::threads], targets[place::threads], rng.spawn(1)[0]) for place in range(threads)]
        made = list(
            pool.map(lambda share: step_gradients(sam, features, share[0], share[1], share[2], weights), shares)
        )
        for weight, *parts in zip(weights, *(gradients for gradients, _ in made), strict=True):
            weight.grad = sum(parts[1:], parts[0]) / threads
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        keep = min(0.998, (step + 1) / (step + 20))
        for name, value in state.items():
            average[name].lerp_(value, 1 - keep)
        sums += np.mean([figures for _, figures in made], axis=0)
        done = step + 1
        if done % 100 == 0:
            loss_mean, *iou_means = sums / 100
            shown = " ".join(f"{value:.3f}" for value in iou_means)
            rate_now = (done - start) / (time.monotonic() - began)
            say(f"sam step {done}/{schedule.steps} loss {loss_mean:.3f} iou by round {shown} {rate_now:.2f} steps/s")
            sums[:] = 0
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
    sam.load_state_dict(average, strict=False)
    sam.requires_grad_(False)


def step_gradients(
    sam: Any, features: TrunkFeatures, rows: list[int], targets: list[Target], rng: Rng, weights: list[Tensor]
) -> tuple[list[Tensor], list[float]]:
    """Gradients of one share of a batch; its loss and the IoU of every round. On one thread of torch's."""
    torch.set_num_threads(1)
    loss, ious = sam_step(sam, features.batch(rows), targets, rng)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    filled = [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    return filled, [float(loss.detach()), *ious]


def draw_batch(
    rng: Rng,
    pictures: Pictures,
    size: int,
    product_prompts: Callable[[int], tuple[Tensor, Tensor, Tensor] | None] | None,
) -> tuple[list[int], list[Target]]:
    """Numbers of pictures and a target in each."""
    rows: list[int] = []
    targets: list[Target] = []
    while len(rows) < size:
        row = int(rng.integers(len(pictures)))
        kinds = np.asarray(pictures.kinds[row])
        if product_prompts is not None and len(rows) % 3 == 0 and kinds.any():
            made = product_prompts(row)
            if made is not None:
                points, labels, present = (tensor.numpy() for tensor in made)
                rows.append(row)
                targets.append(Target(kinds > 0, points, labels, present, None))
                continue
        target = draw_target(rng, kinds, np.asarray(pictures.parts[row]))
        if target is not None:
            rows.append(row)
            targets.append(target)
    return rows, targets


def sam_step(sam: Any, levels: list[Tensor], targets: list[Target], rng: Rng) -> tuple[Tensor, list[float]]:
    """Four rounds: the prompt, then with the last logits, then with further points, then with the box of the mask."""
    embedding = sam.image_encoder.neck(levels)
    refiner = MaskRefiner(sam)
    edge = 4 * embedding.shape[-1]
    masks = torch.from_numpy(np.stack([target.mask for target in targets])).float()
    truth = functional.interpolate(masks.unsqueeze(1), (edge, edge), mode="area").squeeze(1)
    scale = masks.shape[-1] / edge
    points = torch.from_numpy(np.stack([target.points for target in targets]))
    labels = torch.from_numpy(np.stack([target.labels for target in targets]))
    present = torch.from_numpy(np.stack([target.present for target in targets]))
    boxed = torch.tensor([target.box is not None for target in targets])
    boxes = torch.from_numpy(
        np.stack([np.zeros(4, np.float32) if target.box is None else target.box for target in targets])
    )
    total = torch.zeros(())
    ious: list[float] = []
    previous: Tensor | None = None
    for number in range(ROUNDS):
        logits, scores = refiner.decode(embedding, points, labels, present, boxes, boxed, previous)
        losses, real = mask_losses(logits, truth), mask_iou(logits, truth)
        best = losses[:, 1:].min(dim=1).values
        total = total + best.mean() + 0.5 * losses[:, 0].mean() + functional.mse_loss(scores, real.float())
        chosen = scores[:, 1:].argmax(dim=1)
        rows = torch.arange(len(targets))
        ious.append(float(real[rows, chosen + 1].float().mean()))
        picked = logits[rows, chosen + 1].detach()
        previous = picked.unsqueeze(1)
        if number == 1:
            further_points(rng, picked, truth, scale, points, labels, present)
        if number == 2:
            boxes, boxed = boxes_of(picked, boxes, boxed, scale)
    return total / ROUNDS, ious


def boxes_of(logits: Tensor, boxes: Tensor, boxed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The tight box of each mask, in SAM's frame, as the cascade's last level takes it; the old one where empty."""
    boxes, boxed = boxes.clone(), boxed.clone()
    for row, found in enumerate(logits > 0):
        if bool(found.any()):
            ys, xs = torch.nonzero(found, as_tuple=True)
            low, high = torch.stack([xs.min(), ys.min()]), torch.stack([xs.max(), ys.max()])
            boxes[row] = torch.cat([(low + 0.5) * scale - 0.5, (high + 0.5) * scale - 0.5])
            boxed[row] = True
    return boxes, boxed


def held_out_prompts(pictures: Pictures, seed: int) -> Iterator[tuple[int, NDArray[np.bool_], Rng]]:
    """One defect of every bad picture, always the same ones."""
    for row in range(len(pictures)):
        rng = np.random.default_rng((seed, row))
        defects = np.asarray(pictures.kinds[row]) > 0
        if not defects.any():
            continue
        count, labels = cv2.connectedComponents(defects.astype(np.uint8), connectivity=8)
        areas = np.bincount(labels.ravel())[1:count]
        large = np.flatnonzero(areas >= 12) + 1
        if len(large):
            yield row, labels == int(rng.choice(large)), rng


@torch.no_grad()
def prompt_quality(sam: Any, pictures: Pictures, seed: int = 5) -> dict[str, float]:
    """Mean IoU, the mask chosen by predicted IoU: from one positive point, and from a box and a point."""
    refiner = MaskRefiner(sam)
    point_ious: list[float] = []
    box_ious: list[float] = []
    for row, mask, rng in held_out_prompts(pictures, seed):
        image = torch.from_numpy(np.asarray(pictures.image[row])).permute(2, 0, 1).unsqueeze(0).float()
        embedding = sam.image_encoder(sam.preprocess(image))
        points, labels, present = draw_points(rng, mask, 1, 0)
        at, label, there = (torch.from_numpy(part).unsqueeze(0) for part in (points, labels, present))
        ys, xs = np.nonzero(mask)
        box = torch.tensor([[xs.min(), ys.min(), xs.max(), ys.max()]], dtype=torch.float32)
        wanted = torch.from_numpy(mask).unsqueeze(0).float()
        for target, with_box in ((point_ious, None), (box_ious, box)):
            logits, scores = refiner.decode(embedding, at, label, there, with_box)
            chosen = int(scores[0, 1:].argmax()) + 1
            full = functional.interpolate(logits[:, chosen : chosen + 1], mask.shape, mode="bilinear")
            target.append(float(mask_iou(full, wanted)[0, 0]))
    return {"point_iou": float(np.mean(point_ious)), "box_point_iou": float(np.mean(box_ious))}
