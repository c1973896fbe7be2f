"""How good a bundle is on drawn parts of families and with kinds of defects that nothing was trained on.

    python tests/bench/held_out.py [--bundle demo] [--work DIR] [--photographs DIR]

CLIP's map alone, and the map after each level of the cascade, of which the last is the final one (pixel AUROC, F1-max,
AP, image AUROC, of maps taken at every other pixel), on 300 pictures of 384 px; SAM's mean IoU from a point, a box and
both on one defect of each bad picture of 200 at 512 px, and the same on 200 of the pictures that it was trained on.
With a folder of photographs the first figures again on 300 pictures of parts that are made of those which
`flawline train-demo --photographs` keeps from training.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flawline.config.recipe import Recipe
from flawline.models.inspector import Inspector
from flawline.models.training.build import SAM_PICTURES, SAM_UNSEEN_PICTURES, UNSEEN_PICTURES
from flawline.models.training.pictures import Pictures, draw_set
from flawline.models.training.validate import auroc, figures, prompt_quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--work", type=Path, help="keeps the drawn pictures")
    parser.add_argument("--photographs", type=Path, help="folder of photographs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        measure(given.bundle, given.work or Path(made), given.photographs)


@torch.inference_mode()
def measure(bundle: str, work: Path, photographs: Path | None) -> None:
    """Print every figure."""
    inspector = Inspector.load(bundle, device="cpu")
    print_maps(inspector, draw_set(UNSEEN_PICTURES, work))
    if photographs is not None:
        print("parts made of photographs:")
        album = {"photographs": str(photographs.resolve()), "photographed": 1.0}
        print_maps(inspector, draw_set(replace(UNSEEN_PICTURES, name="photographed", seed=22, **album), work))
    for name, asked in (("SAM", SAM_UNSEEN_PICTURES), ("SAM, seen in training", replace(SAM_PICTURES, count=200))):
        quality = prompt_quality(inspector.towers.sam, draw_set(asked, work))
        print(name, " ".join(f"{key} {value:.3f}" for key, value in quality.items()))


def print_maps(inspector: Inspector, unseen: Pictures) -> None:
    """How good CLIP's map and the final one are."""
    truth = unseen.kinds[:, ::2, ::2] > 0
    bad = (unseen.kinds > 0).reshape(len(unseen), -1).any(axis=1)
    levels = {f"level {n}": Recipe.model_validate({"cascade": {"levels": n}}) for n in (1, 2, 3)}
    shown: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ("CLIP alone", *levels)}
    scores = []
    for image in unseen.image:
        encoded = inspector.encode([np.asarray(image)])
        shown["CLIP alone"].append(inspector.zero_shot(encoded)[0, ::2, ::2].numpy())
        for name, recipe in levels.items():
            result = inspector.judge(encoded, recipe)[0]
            shown[name].append(result.anomaly_map[::2, ::2])
        scores.append(result.score)
    for name, maps in shown.items():
        print(name, " ".join(f"{key} {value:.3f}" for key, value in figures(np.stack(maps), truth).items()))
    values = np.array(scores, np.float32)
    threshold = inspector.towers.bundle.manifest.thresholds.decision
    passed, failed = float((values[~bad] < threshold).mean()), float((values[bad] >= threshold).mean())
    print(f"score: image AUROC {auroc(values, bad):.3f}; at {threshold} {passed:.3f} pass, {failed:.3f} fail rightly")


if __name__ == "__main__":
    main()
