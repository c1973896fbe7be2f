"""How far half precision moves the maps: the bundle in bf16 and fp16 against fp32, on drawn parts.

    python tests/bench/precision.py [--bundle demo] [--parts 20] [--device cpu]

Every other part has two defects. Half precision is slow on a CPU: minutes for fp16.
"""

import argparse

import numpy as np

from flawline.camera.synthetic import choose_product, draw_part
from flawline.models.inspector import Inspector

SIZE = (480, 640)


def main() -> None:
    """Judge the same parts in each precision and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--parts", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    pictures = []
    for number in range(given.parts):
        rng = np.random.default_rng([77, number])
        pictures.append(draw_part(rng, choose_product(rng), *SIZE, defects=number % 2 * 2).image)
    whole = Inspector.load(given.bundle, given.device, "fp32")
    full = [whole.inspect(picture) for picture in pictures]
    print(f"{sum(not result.passed for result in full)} of {len(full)} fail in fp32")
    for precision in ("bf16", "fp16"):
        inspector = Inspector.load(given.bundle, given.device, precision)
        half = [inspector.inspect(picture) for picture in pictures]
        pairs = list(zip(full, half, strict=True))
        apart = [np.abs(one.anomaly_map - other.anomaly_map) for one, other in pairs]
        print(
            f"{precision}: largest {max(map(np.max, apart)):.4f}, mean of each picture's largest "
            f"{np.mean([one.max() for one in apart]):.4f}, mean {np.mean([one.mean() for one in apart]):.6f}, "
            f"largest of the score {max(abs(one.score - other.score) for one, other in pairs):.4f}, "
            f"verdicts that flip {sum(one.passed != other.passed for one, other in pairs)}"
        )


if __name__ == "__main__":
    main()
