"""What the guard's sharpness can tell apart on your own part: taught with good pictures, held against blurred others.

python tests/bench/focus.py GOOD OTHERS     two folders of good, sharp pictures of one product
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from flawline.camera.folder import list_pictures, read_picture
from flawline.camera.guard import sharpness, teach
from flawline.camera.pixels import to_rgb8


def load(folder: str) -> list[np.ndarray]:
    """The folder's pictures, (H, W, 3) uint8 RGB."""
    pictures = []
    for path in list_pictures(Path(folder)):
        pixels, pixel_format = read_picture(path)
        picture = np.empty((*pixels.shape[:2], 3), np.uint8)
        to_rgb8(pixels, pixel_format, picture)
        pictures.append(picture)
    return pictures


def main() -> None:
    taught, held = load(sys.argv[1]), load(sys.argv[2])
    limit = teach((picture, "RGB8") for picture in taught).sharpness
    assert limit is not None
    own = [sharpness(picture) for picture in taught + held]
    print(f"{len(taught)} taught, {len(held)} held; limit {limit:.3f}, own sharpness {min(own):.3f} to {max(own):.3f}")
    for blur in (0.0, 1.0, 1.5, 2.0, 3.0, 5.0):
        soft = [cv2.GaussianBlur(picture, (0, 0), blur) if blur else picture for picture in held]
        print(f"blur of {blur} px: {100 * np.mean([sharpness(picture) < limit for picture in soft]):.0f} % stopped")


if __name__ == "__main__":
    main()
