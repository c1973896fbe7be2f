"""Pictures and masks of a data set as arrays, masks resized as the literature does it. No torch here."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from flawline.camera.folder import read_picture
from flawline.camera.pixels import to_rgb8
from flawline.config.errors import ImageError

if TYPE_CHECKING:
    from flawline.models.datasets import Sample

Size = tuple[int, int]  # height, width


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. Raises ImageError naming the file."""
    pixels, pixel_format = read_picture(path)
    rgb = np.empty((*pixels.shape[:2], 3), np.uint8)
    to_rgb8(pixels, pixel_format, rgb)
    return rgb


def read_mask(path: Path, size: Size | None = None) -> NDArray[np.bool_]:
    """(H, W) bool: which pixels are above 0; of lossy files, whose zeros are not all zero, above 127.

    Colours of a palette count, not their numbers. What an alpha channel hides is no defect; where it alone says
    something, what it shows is one. With `size` (height, width): PIL's antialiased bilinear resize of 0 and 255,
    above one half. Raises ImageError naming the file.
    """
    try:
        with Image.open(path) as picture:
            lossy = picture.format in ("JPEG", "MPO", "WEBP")
            indexed = picture.mode in ("P", "PA")
            mask = np.asarray(picture.convert("RGBA") if indexed else picture)
    except (OSError, UnidentifiedImageError) as error:
        raise ImageError(f"{path}: is not a mask that can be read: {error}") from error
    if mask.ndim == 2:
        return resize_mask(mask > (127 if lossy else 0), size)
    has_alpha = mask.shape[2] in (2, 4)
    marked = mask[..., : mask.shape[2] - has_alpha].max(axis=2) > (127 if lossy else 0)
    if has_alpha and mask[..., -1].min() != mask[..., -1].max():
        shown = mask[..., -1] > 0
        marked = marked & shown if marked.any() else shown
    return resize_mask(marked, size)


def resize_mask(mask: NDArray[np.bool_], size: Size | None) -> NDArray[np.bool_]:
    """(H, W) bool -> `size`, as `read_mask` does it."""
    if size is None or mask.shape == size:
        return mask
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    resized = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return np.asarray(resized.astype(np.float32) / 255.0 > 0.5)


def truth(sample: "Sample", shape: Size, size: Size | None) -> NDArray[np.bool_] | None:
    """The mask of a picture of `shape` at `size` (None: its own); all False for a good one; None if unknown."""
    if not sample.defective:
        return np.zeros(size or shape, bool)
    return read_mask(sample.mask, size) if sample.mask is not None else None
