"""The frames a picture is seen in and the way between them: captured, CLIP's squashed, SAM's padded square.

Pixel coordinates name pixel centres: the centre of the first pixel is (0, 0), its upper left corner
(-0.5, -0.5). Points are x, y; sizes are height, width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ImageError

REFERENCE_SIZE = 518  # the CLIP frame in which kernel sizes and spacings are given
REFERENCE_SAM_SIZE = 1024  # the SAM frame in which a spacing may be given


@dataclass(frozen=True)
class FrameGeometry:
    """One picture of `height` x `width` in CLIP's S x S frame and in SAM's P x P frame."""

    height: int
    width: int
    clip_size: int
    sam_size: int

    @property
    def sam_height(self) -> int:
        """Rows of SAM's frame that show the picture; the rest is padding."""
        return int(self.height * self.sam_size / max(self.height, self.width) + 0.5)

    @property
    def sam_width(self) -> int:
        """Columns of SAM's frame that show the picture; the rest is padding."""
        return int(self.width * self.sam_size / max(self.height, self.width) + 0.5)

    def clip_to_image(self, points: Tensor) -> Tensor:
        """(..., 2) x, y in CLIP's frame -> the same in the picture, kept inside it."""
        # by plain numbers: a tensor made of them would have to be copied to the device, and waited for
        x = ((points[..., 0] + 0.5) * (self.width / self.clip_size) - 0.5).clamp(0.0, self.width - 1.0)
        y = ((points[..., 1] + 0.5) * (self.height / self.clip_size) - 0.5).clamp(0.0, self.height - 1.0)
        return torch.stack([x, y], dim=-1)

    def image_to_sam(self, points: Tensor) -> Tensor:
        """(..., 2) x, y in the picture -> SAM's frame, by segment_anything's convention (a mere factor)."""
        x = points[..., 0] * (self.sam_width / self.width)
        y = points[..., 1] * (self.sam_height / self.height)
        return torch.stack([x, y], dim=-1)


def as_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) RGB or (H, W) grey, bytes -> (H, W, 3) contiguous. Raises ImageError for any other form."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"an image is a numpy array of uint8, not {kind}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"an image has the shape (H, W, 3) or (H, W), not {image.shape}")
    check_shape(*image.shape[:2])
    return np.ascontiguousarray(image)


def check_shape(height: int, width: int) -> None:
    """Raises ImageError for an empty picture, or one so narrow that SAM's frame would hold less than a pixel of it."""
    if min(height, width) < 1 or max(height, width) > 128 * min(height, width):
        raise ImageError(f"an image of {width} x {height} pixels cannot be judged")


def upload(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(H, W, 3) bytes -> (1, 3, H, W) bytes on the device, channels last in memory as they came."""
    source = image if image.flags.writeable else image.copy()
    return torch.from_numpy(source).to(device, non_blocking=True).permute(2, 0, 1).unsqueeze(0)


def squash(image: Tensor, size: int) -> Tensor:
    """(1, 3, H, W) bytes -> (1, 3, size, size) in [0, 255]: CLIP's frame, aspect ratio not kept.

    Antialiased bicubic, within two grey levels of PIL's.
    """
    return _resize(image, (size, size), "bicubic")


def fit(image: Tensor, geometry: FrameGeometry) -> Tensor:
    """(1, 3, H, W) bytes -> (1, 3, sam_height, sam_width) in [0, 255]: SAM's frame before its padding.

    Antialiased bilinear. On the CPU it is PIL's, byte for byte what segment_anything sees; on another
    device within two grey levels of it.
    """
    size = (geometry.sam_height, geometry.sam_width)
    if image.device.type != "cpu" or image.shape[-2:] == size:
        return _resize(image, size, "bilinear")
    pixels = image[0].permute(1, 2, 0).contiguous().numpy()
    resized = np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(resized).permute(2, 0, 1).unsqueeze(0)


def _resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    # PIL goes in two passes and rounds to bytes between them; the rows first only where that saves work
    rows_first = size[0] < height and size[1] > width
    steps = [(size[0], width), size] if rows_first else [(height, size[1]), size]
    on_cpu = image.device.type == "cpu"
    if on_cpu and not rows_first:
        steps = [size]  # torch's kernel for bytes works as PIL does, in this order
    resized = image if on_cpu else image.float()
    for step in steps:
        if resized.shape[-2:] != step:
            resized = functional.interpolate(resized, step, mode=mode, antialias=True, align_corners=False)
            if not on_cpu:
                resized = resized.round().clamp(0.0, 255.0)
    return resized
