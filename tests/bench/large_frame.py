"""One frame of 20 megapixels in tiles, SAM on every tile: time and the largest memory the process ever had.

python tests/bench/large_frame.py [--bundle demo] [--tile-batch 4] [--threads 1]
"""

import argparse
import resource
import time

import cv2
import numpy as np
import torch

from flawline.camera.synthetic import choose_product, draw_part
from flawline.config.recipe import Recipe
from flawline.models.inspector import Inspector

SIZE = (3648, 5472)


def peak_mib() -> float:
    """Resident memory at its largest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Load, warm up, judge one frame."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--tile-batch", type=int, default=Inspector.tile_batch)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rng = np.random.default_rng(5)
    small = draw_part(rng, choose_product(rng, "plate"), SIZE[0] // 8, SIZE[1] // 8, defects=3).image
    frame = cv2.resize(small, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-6, 7, frame.shape, dtype=np.int16)
    picture = np.clip(frame + noise, 0, 255).astype(np.uint8)
    del frame, noise
    inspector = Inspector.load(given.bundle, "cpu", "fp32")
    inspector.tile_batch = given.tile_batch
    recipe = Recipe.model_validate({"tiling": {"enabled": True}, "prompt": {"region_threshold": 0.0}})
    inspector.inspect(picture[:480, :640], recipe)
    print(f"loaded: {peak_mib():.0f} MiB")
    wall, used = time.perf_counter(), time.process_time()
    result = inspector.inspect(picture, recipe)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    stages = ", ".join(f"{stage} {ms:.0f}" for stage, ms in result.stage_ms.items())
    print(f"{wall * 1000:.0f} ms ({stages}), {used:.1f} s of processor time, peak {peak_mib():.0f} MiB")


if __name__ == "__main__":
    main()
