"""The loop that CLIP's image side is trained by: batches shared among threads, checkpoints, averaged weights."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flawline.models.training.batches import Batch

Loss = Callable[[Batch, int], tuple[Tensor, dict[str, float]]]  # of a share of a batch and the step: loss, its parts


@dataclass(frozen=True)
class Loop:
    """What is trained under which name, how long, and where it is kept."""

    name: str
    steps: int
    threads: int
    checkpoint: Path
    checkpoint_every: int


def train(
    loop: Loop,
    modules: nn.ModuleDict,
    groups: list[dict[str, Any]],
    batches_from: Callable[[int], Iterator[Batch]],
    rate_share: Callable[[int], float],
    loss: Loss,
    say: Callable[[str], None],
    validate: Callable[[], dict[str, float]],
) -> None:
    """Train `modules` in place, AdamW, and leave the running average of their weights in them.

    `groups` are the optimiser's, each with its full rate under `top`. Goes on from the checkpoint where there is one.
    """
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.clone() for name, value in modules.state_dict().items()}
    start = 0
    if loop.checkpoint.exists():
        saved = torch.load(loop.checkpoint, weights_only=True)
        start = saved["step"]
        modules.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        average = saved["average"]
        say(f"{loop.name}: going on from step {start}")
    began = time.monotonic()
    sums: dict[str, float] = {}
    weights: list[Tensor] = [weight for group in groups for weight in group["params"]]
    pool = ThreadPoolExecutor(loop.threads, "share")
    for step, batch in zip(range(start, loop.steps), batches_from(start), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = group["top"] * rate_share(step)
        made = list(pool.map(partial(_gradients, loss, weights, step), batch.shares(loop.threads)))
        for weight, *shares in zip(weights, *(gradients for gradients, _ in made), strict=True):
            weight.grad = sum(shares[1:], shares[0]) / len(shares)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        keep = min(0.998, (step + 1) / (step + 20))
        for name, value in modules.state_dict().items():
            if value.dtype.is_floating_point:
                average[name].lerp_(value, 1 - keep)
        for name in made[0][1]:
            sums[name] = sums.get(name, 0.0) + sum(parts[name] for _, parts in made) / len(made)
        done = step + 1
        if done % 50 == 0:
            means = " ".join(f"{name} {value / 50:.3f}" for name, value in sums.items())
            rate = (done - start) / (time.monotonic() - began)
            say(f"{loop.name} step {done}/{loop.steps} {means} {rate:.2f} steps/s")
            sums = {}
        if done % loop.checkpoint_every == 0 or done == loop.steps:
            state = {"step": done, "weights": modules.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state | {"average": average}, loop.checkpoint.with_suffix(".partial"))
            loop.checkpoint.with_suffix(".partial").replace(loop.checkpoint)
            held = {name: value.clone() for name, value in modules.state_dict().items()}
            modules.load_state_dict(average)
            say(f"{loop.name} step {done} unseen families: " + " ".join(f"{k} {v:.3f}" for k, v in validate().items()))
            if done < loop.steps:
                modules.load_state_dict(held)
    pool.shutdown()
    modules.load_state_dict(average)


def _gradients(loss: Loss, weights: list[Tensor], step: int, batch: Batch) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients of one share of a batch, and the loss' parts. One thread: torch keeps one core busy best so."""
    torch.set_num_threads(1)
    value, parts = loss(batch, step)
    return list(torch.autograd.grad(value, weights)), parts
