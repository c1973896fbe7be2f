"""What a V4L2 device can be told, by GenICam's names: set through OpenCV, then read back."""

from collections.abc import Mapping
from typing import Any

import cv2

from flawline.config.errors import ConfigError

_PROPERTIES: dict[str, tuple[int, float]] = {
    "Width": (cv2.CAP_PROP_FRAME_WIDTH, 1.0),
    "Height": (cv2.CAP_PROP_FRAME_HEIGHT, 1.0),
    "AcquisitionFrameRate": (cv2.CAP_PROP_FPS, 1.0),
    "ExposureTime": (cv2.CAP_PROP_EXPOSURE, 0.01),  # us to the 100 us of V4L2
    "Gain": (cv2.CAP_PROP_GAIN, 1.0),
}
"""The property of OpenCV, and the factor to its unit."""
_SIZE = ("Width", "Height")
_NEAR = 0.02  # a control has steps, and a rate is a fraction of whole numbers
_MANUAL = 1.0  # V4L2's word for an exposure that is not automatic


def configure(camera: str, device: str, capture: Any, features: Mapping[str, float | int | bool | str]) -> None:
    """Tell `capture`, a cv2.VideoCapture of the device, all of `features`, then hold it to what it says of itself.

    The size goes first, because a change of it begins the stream anew, and both of its sides go together: OpenCV
    keeps the one to itself until it has the other. So nothing is read back before everything is set. A size must be
    what was asked for, the rest within 2 %: OpenCV does not tell how large a control's steps are.
    Raises ConfigError naming the camera and the feature.
    """
    wanted = {name: _wanted(camera, name, value) for name, value in features.items()}
    if not wanted.keys().isdisjoint(_SIZE):
        for name in _SIZE:
            number, _ = _PROPERTIES[name]
            capture.set(number, wanted.get(name, capture.get(number)))
    for name, value in wanted.items():
        if name == "ExposureTime":
            capture.set(cv2.CAP_PROP_AUTO_EXPOSURE, _MANUAL)
        if name not in _SIZE:
            capture.set(_PROPERTIES[name][0], value)
    for name, value in wanted.items():
        number, factor = _PROPERTIES[name]
        taken = capture.get(number)
        if abs(taken - value) > (0.0 if name in _SIZE else abs(value) * _NEAR):
            raise ConfigError(
                f"camera {camera!r}: features.{name} = {features[name]!r}: {device} takes {taken / factor:g} instead"
            )


def _wanted(camera: str, name: str, value: float | int | bool | str) -> float:
    """The value in OpenCV's unit."""
    if name not in _PROPERTIES:
        raise ConfigError(f"camera {camera!r}: features.{name}: backend 'opencv' knows {', '.join(_PROPERTIES)}")
    try:
        return float(value) * _PROPERTIES[name][1]
    except ValueError as error:
        raise ConfigError(f"camera {camera!r}: features.{name} = {value!r}: a number is needed") from error
