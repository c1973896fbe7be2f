"""What cameras and lines do to a picture, at random: crop, stretch, turn, light, colour, blur, noise, compression."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Rng = np.random.Generator


def augment(
    rng: Rng, image: NDArray[np.uint8], planes: list[NDArray[np.uint8]], size: int
) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """(H, W, 3) RGB and label planes (H, W) -> the same at `size` x `size`; planes keep their values."""
    picture, labels = reframe(rng, image, planes, size)
    return photometric(rng, picture), labels


def reframe(
    rng: Rng, image: NDArray[np.uint8], planes: list[NDArray[np.uint8]], size: int
) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """Crop, stretch and turn alone."""
    height, width = image.shape[:2]
    share = rng.uniform(0.55, 1.0, 2) if rng.random() < 0.7 else np.ones(2)
    h, w = max(32, int(height * share[0])), max(32, int(width * share[1]))
    y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    cut = (slice(y, y + h), slice(x, x + w))
    turns, flip = int(rng.integers(0, 4)), bool(rng.integers(0, 2))

    def place(plane: NDArray[np.uint8], interpolation: int) -> NDArray[np.uint8]:
        resized = cv2.resize(np.ascontiguousarray(plane[cut]), (size, size), interpolation=interpolation)
        turned = np.rot90(resized, turns)
        return np.ascontiguousarray(turned[:, ::-1] if flip else turned).astype(np.uint8)

    shrinks = h * w > size * size
    picture = place(image, cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return picture, [place(plane, cv2.INTER_NEAREST) for plane in planes]


def photometric(rng: Rng, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Light, colour, blur, noise and compression; the geometry stays."""
    picture: NDArray[Any] = image.astype(np.float32)
    if rng.random() < 0.25:
        grey = picture @ np.array([0.299, 0.587, 0.114], np.float32)
        picture = np.repeat(grey[:, :, None], 3, axis=2)
    elif rng.random() < 0.5:
        mix = np.eye(3, dtype=np.float32) + rng.normal(0, 0.12, (3, 3)).astype(np.float32)
        picture = picture @ (mix / mix.sum(axis=0, keepdims=True))
    if rng.random() < 0.7:
        gamma = float(np.exp(rng.normal(0, 0.25)))
        picture = 255.0 * np.clip(picture / 255.0, 0, 1) ** gamma
        picture = (picture - 128) * float(rng.uniform(0.65, 1.3)) + 128 + float(rng.normal(0, 18))
    if rng.random() < 0.25:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.3, 1.4)))
    if rng.random() < 0.35:
        picture = picture + rng.normal(0, float(rng.uniform(1, 10)), picture.shape[:2])[:, :, None]
    result: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        _, data = cv2.imencode(".jpg", result, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 96))])
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)  # channel order is kept: nothing here reads it as a colour
        return np.asarray(decoded, np.uint8)
    return result
