"""How much a few good parts help: a bundle's map by words alone, by memory alone, and by both.

    python tests/bench/shots.py --root DATA [--category C ...] [--shots 0,1,2,4,8,16] [--seeds 3] --out DIR

Pictures are brought to one square size first, because some sets hold several. For every number of shots and every
seed, that many pictures are drawn from `train/good` and learnt as `flawline learn` does it; all test pictures are
judged. Pixel AUROC in CLIP's frame, all pixels pooled; image AUROC
by the map's maximum. 95 % intervals by resampling images, of the first seed. Every run is added to DIR/log.jsonl.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flawline.config.recipe import Recipe
from flawline.models.bootstrap import Tally, bin_edges, image_intervals, intervals
from flawline.models.datasets import Category, object_words, read_dataset
from flawline.models.ground_truth import read_mask, read_rgb
from flawline.models.inspector import Inspector
from flawline.models.memory import Memory
from flawline.models.memory_learn import Learner
from flawline.models.metrics import rank_metrics

Maps = NDArray[np.float32]  # (n, s, s)


@dataclass
class Known:
    """A set's pictures, each encoded once."""

    good: list[Any]
    cells: Tensor  # (n, D, h, w) float16
    words: Tensor  # (n, S, S) float16, the zero-shot map
    masks: NDArray[np.bool_]  # (n, s, s)
    tiles: list[Any]


def read_square(path: Path, size: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(read_rgb(path), (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def encode(inspector: Inspector, recipe: Recipe, category: Category, size: int) -> Known:
    learner = Learner(inspector, category.name, recipe)
    edge = inspector.towers.clip.input_size
    good = [learner.describe(read_square(path, edge), path.name) for path in category.train_good]
    cells, words, masks = [], [], []
    for sample in category.test:
        picture = read_square(sample.image, edge)
        described = learner.describe(picture, sample.image.name)
        cells.append(described.cells[0])
        encoded = inspector.encode([picture], recipe)
        words.append(inspector.zero_shot(encoded, recipe)[0].half())
        blank = np.zeros((size, size), bool)
        masks.append(read_mask(sample.mask, (size, size)) if sample.mask is not None else blank)
    return Known(good, torch.stack(cells), torch.stack(words), np.stack(masks), good[0].tiles)


def maps_of(inspector: Inspector, known: Known, memory: Memory | None, size: int) -> dict[str, Maps]:
    """The three maps of every test picture, at `size`."""
    parts: dict[str, list[Tensor]] = {"words": [], "memory": [], "fused": []}
    for cells, words in zip(known.cells, known.words, strict=True):
        parts["words"].append(words[None].float())
        if memory is not None:
            distances = memory.distances(cells[None].float(), known.tiles)
            parts["fused"].append(memory.fuse(words[None].float(), distances, 0.5))
            edge = words.shape[-1]
            parts["memory"].append(
                functional.interpolate(distances[:, None], (edge, edge), mode="bilinear", align_corners=False)[:, 0]
            )
    return {
        name: functional.interpolate(torch.cat(some)[:, None], (size, size), mode="bilinear", align_corners=False)[
            :, 0
        ].numpy()
        for name, some in parts.items()
        if some
    }


def measure(maps: Maps, known: Known, *, with_intervals: bool) -> dict[str, Any]:
    """Pixel and image AUROC, and their intervals."""
    masks, defective = known.masks, known.masks.any(axis=(1, 2))
    positive, negative = np.sort(maps[masks]), np.sort(maps[~masks])
    scores = maps.reshape(len(maps), -1).max(axis=1)
    pixel = rank_metrics(positive, negative).auroc
    image = rank_metrics(scores[defective], scores[~defective].copy()).auroc
    content: dict[str, Any] = {"pixel_auroc": pixel, "image_auroc": image}
    if with_intervals:
        tally = Tally(bin_edges(positive, negative))
        for one, mask in zip(maps, masks, strict=True):
            tally.add(one, mask)
        content["pixel_interval"] = intervals(tally.tallies(), {"auroc": pixel}).get("auroc")
        content["image_interval"] = image_intervals(scores.astype(np.float64), defective, {"auroc": image}).get("auroc")
    return content


def cost(
    inspector: Inspector, recipe: Recipe, memory: Memory, picture: NDArray[np.uint8], rounds: int
) -> dict[str, Any]:
    """Milliseconds of CPU time a frame, median: CLIP's stage by words alone, and what the memory adds to it."""
    clip, added = [], []
    with torch.inference_mode():
        for _ in range(rounds):
            began = time.process_time()
            encoded = inspector.encode([picture], recipe)
            middle = time.process_time()
            cells = memory.cells(inspector.levels(encoded))
            memory.fuse(inspector.zero_shot(encoded, recipe), memory.distances(cells, encoded.tiles), 0.5)
            memory.strangeness(cells)
            added.append(time.process_time() - middle)
            clip.append(middle - began)
    stage, memory_ms = (1000 * float(np.median(times[1:])) for times in (clip, added))
    return {"clip_ms": stage, "memory_ms": memory_ms, "share": memory_ms / stage, "rows": len(memory.bank)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--category", action="append", default=[])
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--shots", default="0,1,2,4,8,16")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=256, help="edge of the maps that are measured, px")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="frames timed")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    inspector = Inspector.load(options.bundle, device="cpu")
    table = ["| set | shots | words | memory | both (pixel) | words | memory | both (image) |", "|" + "---|" * 8]
    for category in read_dataset("folder", options.root, options.category):
        if not category.train_good:
            continue
        recipe = Recipe(object=object_words("folder", category.name))
        edge = inspector.towers.clip.input_size
        known = encode(inspector, recipe, category, options.size)
        memory: Memory | None = None
        for shots in (int(number) for number in options.shots.split(",")):
            if shots > len(known.good):
                print(f"{category.name}: has {len(known.good)} good pictures, so no {shots} shots", flush=True)
                shots = len(known.good)
            runs = []
            for seed in range(options.seeds if 0 < shots < len(known.good) else 1):
                drawn = np.random.default_rng(seed).permutation(len(known.good))[:shots]
                if shots:
                    learner = Learner(inspector, category.name, recipe)
                    for number in drawn:
                        learner.take(known.good[number])
                    learnt = learner.learn()
                    memory = learnt.memory
                maps = maps_of(inspector, known, memory if shots else None, options.size)
                measured = {name: measure(some, known, with_intervals=seed == 0) for name, some in maps.items()}
                runs.append(measured)
                line = {
                    "when": time.strftime("%Y-%m-%d %H:%M:%S"),
                    "set": category.name,
                    "bundle_sha256": inspector.towers.bundle.sha256,
                    "shots": shots,
                    "seed": seed,
                    "place": memory.about.place if memory and shots else None,
                    "outliers": memory.about.outliers if memory and shots else None,
                    **measured,
                }
                with (options.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
            columns = [
                _cell([run[name][metric] for run in runs if name in run])
                for metric in ("pixel_auroc", "image_auroc")
                for name in ("words", "memory", "fused")
            ]
            table.append(f"| {category.name} | {shots} | " + " | ".join(columns) + " |")
        if memory is not None and options.rounds:
            spent = cost(inspector, recipe, memory, read_square(category.test[0].image, edge), options.rounds)
            print(json.dumps({"set": category.name, **spent}), flush=True)
    (options.out / "shots.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


def _cell(values: list[float]) -> str:
    """Mean over the seeds, and how far they spread."""
    if not values:
        return ""
    spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
