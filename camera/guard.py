"""Looks at each picture before it is judged: black, saturated, out of focus, frozen, of the wrong size or depth."""

import zlib
from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import ImageError
from flawline.config.settings_camera import CameraSettings, GuardSettings

_SAMPLE = 100  # levels and likeness are taken from a grid of about 100 x 100 pixels
_TILE = 128  # sharpness is taken from 3 x 3 tiles of this size, at full resolution
_BRIGHT = 250
_FLOOR = 0.05  # mean squared gradient below which there is nothing to see: an even picture has sharpness 0
_FROZEN_AFTER = {"genicam": 2, "pylon": 2, "gentl": 2, "opencv": 5}
"""A sensor's noise makes no two pictures alike; a compressed stream may send a still scene twice. Files may repeat."""


def sample(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A regular grid of the picture's pixels, (h, w, 3) uint8, about 100 x 100 of them; a view."""
    step = max(1, min(picture.shape[:2]) // _SAMPLE)
    return picture[::step, ::step]


def levels(grid: NDArray[np.uint8]) -> tuple[int, float]:
    """What the grid's pixels are in their brightest channel: the level that 99 % of them do not exceed (0 to 255),
    and the share of them at 250 or above (0 to 1)."""
    red, green, blue = cv2.split(grid)
    counts = np.cumsum(np.bincount(cv2.max(cv2.max(red, green), blue).reshape(-1), minlength=256))
    return int(np.searchsorted(counts, 0.99 * counts[-1])), float(1 - counts[_BRIGHT - 1] / counts[-1])


def sharpness(picture: NDArray[np.uint8]) -> float:
    """By how much a blur changes the picture: 0 where it is blurred already, about 1 and more where it is sharp.

    The root of the gradients' mean square after a Gaussian blur of 1 px over the same after one of 3 px, minus 1:
    a step blurred by s px gives ((s^2 + 9) / (s^2 + 1))^(1/4) - 1, whatever its height. (To blur again and see what
    changes is the idea of Crete et al., "The blur effect", 2007.) Measured on nine tiles of (128, 128) px.
    """
    height, width = picture.shape[:2]
    fine = coarse = 0.0
    for y in np.linspace(0, max(0, height - _TILE), 3).astype(int):
        for x in np.linspace(0, max(0, width - _TILE), 3).astype(int):
            grey = cv2.cvtColor(picture[y : y + _TILE, x : x + _TILE], cv2.COLOR_RGB2GRAY).astype(np.float32)
            fine += _gradient(cv2.GaussianBlur(grey, (0, 0), 1.0)) + _FLOOR
            coarse += _gradient(cv2.GaussianBlur(grey, (0, 0), 3.0)) + _FLOOR
    return float(np.sqrt(fine / coarse) - 1)


def _gradient(plane: NDArray[np.float32]) -> float:
    """Mean squared gradient, levels squared per px squared."""
    across, down = np.diff(plane, axis=1), np.diff(plane, axis=0)
    return float(np.mean(across * across) + np.mean(down * down))


class Guard:
    """One camera's guard. `check` is called for every frame, in order."""

    def __init__(self, camera: CameraSettings) -> None:
        self._settings = camera.guard
        usual = 0 if camera.path is not None else _FROZEN_AFTER.get(camera.backend, 0)
        self._frozen_after = usual if camera.guard.frozen_after is None else camera.guard.frozen_after
        self._fingerprint = 0
        self._same = 0

    def check(self, picture: NDArray[np.uint8], pixel_format: str) -> None:
        """Raises ImageError, saying why, where no one should judge `picture`, (H, W, 3) uint8 RGB.

        `pixel_format` is what the camera sent it as.
        """
        limits = self._settings
        if not limits.enabled:
            return
        _check_form(limits, picture.shape[0], picture.shape[1], pixel_format)
        grid = sample(picture)
        frozen = self._is_frozen(grid)  # counted first, said last: under a lens cap all pictures are the same
        level, share = levels(grid)
        if level < limits.black_level:
            raise ImageError(
                f"black: 99 % of the picture is at {level} of 255 or darker (guard.black_level = "
                f"{limits.black_level:g}): lens cap, light off, or no exposure"
            )
        if share > limits.saturated_share:
            raise ImageError(
                f"saturated: {100 * share:.0f} % of the picture is at {_BRIGHT} of 255 or brighter "
                f"(guard.saturated_share = {limits.saturated_share:g})"
            )
        if frozen:
            raise ImageError(f"frozen: the last {self._same} pictures are the same, bit by bit")
        if limits.sharpness is not None:
            fine = sharpness(picture)
            if fine < limits.sharpness:
                raise ImageError(
                    f"out of focus: sharpness {fine:.3f}, at least {limits.sharpness:g} is needed (guard.sharpness)"
                )

    def _is_frozen(self, grid: NDArray[np.uint8]) -> bool:
        if not self._frozen_after:
            return False
        fingerprint = zlib.crc32(grid.tobytes())
        self._same = self._same + 1 if fingerprint == self._fingerprint and self._same else 1
        self._fingerprint = fingerprint
        return self._same >= self._frozen_after


def _check_form(limits: GuardSettings, height: int, width: int, pixel_format: str) -> None:
    if (limits.width not in (None, width)) or (limits.height not in (None, height)):
        wanted = f"{limits.width or 'any'} x {limits.height or 'any'}"
        raise ImageError(f"wrong size: {width} x {height} px, {wanted} is expected")
    if limits.pixel_format not in (None, pixel_format):
        raise ImageError(f"wrong depth: {pixel_format}, {limits.pixel_format} is expected")


def teach(good: Iterable[tuple[NDArray[np.uint8], str]]) -> GuardSettings:
    """Limits from good pictures and the formats they came in: with room around what was seen.

    Black: half of the darkest picture's bright level. Saturated: twice the largest share plus 0.1. Sharpness: 0.7 of
    the least. Raises ImageError where there is no picture, or they differ in size or format.
    """
    bright, shares, fine, forms = [], [], [], []
    for picture, pixel_format in good:
        level, share = levels(sample(picture))
        bright.append(level)
        shares.append(share)
        fine.append(sharpness(picture))
        forms.append((picture.shape[1], picture.shape[0], pixel_format))
    if not forms:
        raise ImageError("no good picture to learn from")
    other = next((form for form in forms if form != forms[0]), None)
    if other is not None:
        raise ImageError(f"the good pictures differ in form: {forms[0]} and {other}")
    width, height, pixel_format = forms[0]
    return GuardSettings(
        black_level=round(min(bright) / 2, 1),
        saturated_share=round(min(1.0, 2 * max(shares) + 0.1), 3),
        sharpness=round(0.7 * min(fine), 4),
        width=width,
        height=height,
        pixel_format=pixel_format,
    )
