"""What the memory should say beside the words: both maps on drawn products of held-out families, at several shares.

    python tests/bench/memory_share.py [--products 4] [--good 8] [--alarmed] [--shift PX] [--registered]
        [--doubt 0 0.5 0.7] [--photographs DIR]

Of every product so many good parts are learnt; 8 other good parts and 12 with one defect are judged (384 px, maps taken
at every other pixel). For each `memory_share`: pixel AUROC, AP and image AUROC, each the mean over products. With
`--alarmed` only products count on whose typical good part the words alone reach the threshold of S_a. With `--shift`
every part lies up to so many px out of place, down or up and right or left; with `--registered` the recipe has
`memory_registration`. `--doubt` is where the words begin to count; of each a table. With `--photographs` every other
product is made of those photographs in DIR that `train-demo` keeps from training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flawline.camera.synthetic import DEFECT_KINDS, UNSEEN_FAMILIES, Product, choose_product, draw_part
from flawline.config.recipe import Recipe
from flawline.models.inspector import Inspector
from flawline.models.memory import DOUBT, Memory, logit
from flawline.models.memory_learn import Learner
from flawline.models.training.photographs import open_album
from flawline.models.training.validate import figures

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZE, GOOD, BAD = 384, 8, 12
Settings = Sequence[tuple[float, float]]  # doubt and share
SHOWN = ("pixel_auroc", "pixel_ap", "image_auroc")


def draw_shifted(
    rng: np.random.Generator, product: Product, defects: int, shift: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A part up to `shift` px out of place, and where its defects are."""
    edge = SIZE + 2 * shift
    part = draw_part(rng, product, edge, edge, defects=defects, kinds=DEFECT_KINDS)
    y, x = (int(corner) for corner in rng.integers(0, 2 * shift + 1, 2)) if shift else (0, 0)
    window = slice(y, y + SIZE), slice(x, x + SIZE)
    return np.ascontiguousarray(part.image[window]), part.kinds[window]


@torch.inference_mode()
def measure(
    inspector: Inspector, product: Product, memory: Memory, rng: np.random.Generator, shift: int, settings: Settings
) -> list[list[float]]:
    """The figures of one product, the words alone first, then a row for each setting."""
    threshold = inspector.prepare(Recipe()).region_threshold
    fused: list[list[NDArray[np.float32]]] = [[] for _ in range(1 + len(settings))]
    truth = []
    for number in range(GOOD + BAD):
        image, kinds = draw_shifted(rng, product, int(number >= GOOD), shift)
        encoded = inspector.encode([image])
        words = inspector.zero_shot(encoded)
        distances = memory.look(inspector.levels(encoded), encoded.tiles, (SIZE, SIZE)).distances
        fused[0].append(words[0, ::2, ::2].numpy())
        for maps, (doubt, share) in zip(fused[1:], settings, strict=True):
            maps.append(memory.fuse(words, distances, threshold, share, doubt)[0, ::2, ::2].numpy())
        truth.append(kinds[::2, ::2] > 0)
    found = [figures(np.stack(maps), np.stack(truth)) for maps in fused]
    return [[row[name] for name in SHOWN] for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--products", type=int, default=4, help="of each family")
    parser.add_argument("--good", type=int, default=8, help="parts that are learnt")
    parser.add_argument("--alarmed", action="store_true")
    parser.add_argument("--shift", type=int, default=0, help="px")
    parser.add_argument("--registered", action="store_true")
    parser.add_argument("--doubt", type=float, nargs="+", default=[DOUBT])
    parser.add_argument("--photographs", type=Path)
    given = parser.parse_args()
    settings = [(doubt, share) for doubt in given.doubt for share in SHARES]
    album = None if given.photographs is None else open_album(given.photographs, True)
    recipe = Recipe(memory_registration=given.registered)
    inspector = Inspector.load(given.bundle, device="cpu")
    least = logit(inspector.prepare(Recipe()).region_threshold)
    rows = []
    for number, family in enumerate(UNSEEN_FAMILIES):
        for count in range(given.products):
            rng = np.random.default_rng((77, number, count))
            product = choose_product(rng, family=family)
            if album is not None and count % 2:
                product = album.dress(rng, product)
            learner = Learner(inspector, "product", recipe)
            for place in range(given.good):
                learner.add(draw_shifted(rng, product, 0, given.shift)[0], str(place))
            memory = learner.learn().memory
            if given.alarmed and memory.about.zero_shot_striking < least:
                continue
            rows.append(measure(inspector, product, memory, rng, given.shift, settings))
            places = "count" if memory.about.place else "do not count"
            reached = f"on good parts the words reach {memory.about.zero_shot_striking:.2f}"
            print(f"{family} {count}: {reached}, places {places}", flush=True)
    if not rows:
        raise SystemExit("no product on whose good parts the words reach the threshold: give more --products")
    print(f"{len(rows)} products\ndoubt  share  " + "  ".join(SHOWN))
    names = ["words alone ", *(f"{doubt:5.1f}  {share:5.1f}" for doubt, share in settings)]
    for name, means in zip(names, np.nanmean(np.array(rows), axis=0), strict=True):
        print(name, *(f"{value:{len(shown)}.3f}" for shown, value in zip(SHOWN, means, strict=True)), sep="  ")


if __name__ == "__main__":
    main()
