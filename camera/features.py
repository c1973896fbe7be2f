"""Camera features by their GenICam names: checked against the camera's own limits, then written."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings

Kind = Literal["integer", "float", "enumeration", "boolean", "string", "command", "other"]
Value = float | int | bool | str

# The names that the standard had before version 2, where unit and meaning are the same.
_OLDER_NAMES = {"ExposureTime": "ExposureTimeAbs", "AcquisitionFrameRate": "AcquisitionFrameRateAbs"}
_RATES = frozenset({"AcquisitionFrameRate", "AcquisitionFrameRateAbs"})
_IF_POSSIBLE = frozenset({"TriggerMode", "AcquisitionFrameRateEnable"})
"""What only makes the camera ready for the rest: one that runs freely need not let them be written."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature as the camera has it now."""

    name: str
    kind: Kind
    writable: bool
    low: float | None = None  # least and largest value, and the step between values, of a number
    high: float | None = None
    step: float | None = None
    entries: tuple[str, ...] = ()  # of an enumeration


class FeatureMap(Protocol):
    """A connected camera's features. Errors of the vendor's library come out as CameraError."""

    def names(self) -> Iterable[str]:
        """Every feature's name."""
        ...

    def feature(self, name: str) -> Feature | None:
        """The feature of that name, None where the camera has none."""
        ...

    def read(self, name: str) -> Value | None:
        """Its value, None where there is none to read."""
        ...

    def write(self, feature: Feature, value: Value) -> None:
        """Set it."""
        ...

    def execute(self, name: str) -> None:
        """Send the command."""
        ...


def configure(camera: CameraSettings, features: FeatureMap) -> None:
    """Write what the settings say, in the order that cameras demand.

    First the trigger's selector and its mode Off, because a camera that waits for a trigger, as the last run left it,
    may lock TriggerSource; then TriggerSource; then the table `features` in its order; then the rate, whose limit
    depends on format, size and exposure; TriggerMode last. Where the table names one of these, the table wins.
    Raises ConfigError naming the camera, the feature, and what the camera allows; CameraError where the camera
    refuses all the same.
    """
    table = camera.features
    ready = _ready(camera, features)
    if camera.fps is not None and camera.trigger != "free":
        raise ConfigError(f"camera {camera.name!r}: fps is for free run, but trigger = {camera.trigger!r}")
    _make_ready(camera.name, features, ready)
    for name, value in table.items():
        if name == "TriggerMode":
            continue
        if apply(camera.name, features, name, value) == "command":
            _make_ready(camera.name, features, ready)  # UserSetLoad brings another trigger with it
    if camera.fps is not None and _RATES.isdisjoint(table):
        if "AcquisitionFrameRateEnable" not in table and features.feature("AcquisitionFrameRateEnable") is not None:
            apply(camera.name, features, "AcquisitionFrameRateEnable", True)
        apply(camera.name, features, "AcquisitionFrameRate", camera.fps, key="fps")
    mode = table.get("TriggerMode", None if camera.trigger == "free" else "On")
    if mode is not None:
        apply(camera.name, features, "TriggerMode", mode)
    elif features.feature("TriggerMode") is not None and features.read("TriggerMode") == "On":
        apply(camera.name, features, "TriggerMode", "Off")  # else it would be known by its silence only


def _ready(camera: CameraSettings, features: FeatureMap) -> Mapping[str, Value]:
    """What is to stand before the table is written, in this order. ConfigError where there is no such trigger."""
    table = camera.features
    ready: dict[str, Value] = {}
    if "AcquisitionMode" not in table and _offers(features, "AcquisitionMode", "Continuous"):
        ready["AcquisitionMode"] = "Continuous"
    selector = table.get("TriggerSelector", "FrameStart")  # it says whose mode and source are meant
    if _offers(features, "TriggerSelector", str(selector)):
        ready["TriggerSelector"] = selector
    if _offers(features, "TriggerMode", "Off"):
        ready["TriggerMode"] = "Off"
    if camera.trigger != "free" and not _offers(features, "TriggerMode", "On"):
        raise ConfigError(f"camera {camera.name!r}: trigger = {camera.trigger!r}: the camera has no TriggerMode")
    if camera.trigger != "free" and (source := _source(camera, features)) is not None:
        ready["TriggerSource"] = source
    named = not _RATES.isdisjoint(table)
    if "AcquisitionFrameRateEnable" not in table and (
        camera.fps is not None or (camera.trigger != "free" and not named)
    ):
        # Off, or the rate of the last run would limit the exposure, and triggers that come faster would be dropped
        # without a word; on where the table is to write a rate of its own.
        ready["AcquisitionFrameRateEnable"] = named
    return ready


def _source(camera: CameraSettings, features: FeatureMap) -> str | None:
    """Where the trigger comes from; None where the table says it."""
    named = "TriggerSource" in camera.features
    if camera.trigger == "software":
        if not _offers(features, "TriggerSource", "Software"):
            raise ConfigError(f"camera {camera.name!r}: trigger = 'software': the camera has no software trigger")
        return None if named else "Software"
    if named:
        return None
    source = features.feature("TriggerSource")
    lines = [entry for entry in (source.entries if source else ()) if entry.startswith("Line")]
    if not lines:
        raise ConfigError(f"camera {camera.name!r}: trigger = 'hardware': the camera has no line as TriggerSource")
    return "Line1" if "Line1" in lines else lines[0]


def _make_ready(camera: str, features: FeatureMap, ready: Mapping[str, Value]) -> None:
    for name, value in ready.items():
        if name in _IF_POSSIBLE:
            feature = features.feature(name)
            if feature is None or not feature.writable:
                continue
        apply(camera, features, name, value)


def _offers(features: FeatureMap, name: str, entry: str) -> bool:
    feature = features.feature(name)
    return feature is not None and entry in feature.entries


def apply(camera: str, features: FeatureMap, name: str, value: Value, key: str | None = None) -> Kind:
    """Check a value against the camera's limits and write it; returns the feature's kind. `key` names it in errors."""
    key = key or f"features.{name}"
    feature = features.feature(name)
    if feature is None and name in _OLDER_NAMES:
        feature = features.feature(_OLDER_NAMES[name])
    if feature is None:
        raise ConfigError(f"camera {camera!r}: {key}: the camera has no feature {name!r}{nearest(name, features)}")
    checked = _checked(f"camera {camera!r}: {key} = {value!r}", feature, value)
    if feature.kind == "command":
        features.execute(feature.name)
    elif not feature.writable:
        if features.read(feature.name) != checked:
            raise ConfigError(
                f"camera {camera!r}: {key} = {value!r}: the camera does not let {feature.name} be set now"
            )
    else:
        features.write(feature, checked)
    return feature.kind


def nearest(name: str, features: FeatureMap) -> str:
    """`; did you mean ...?` with up to three names like this one."""
    by_lower = {known.lower(): known for known in features.names()}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(by_lower[low]) for low in close)}?" if close else ""


def _checked(what: str, feature: Feature, value: Value) -> Value:
    """The value in the feature's own type. Raises ConfigError with what is allowed."""
    match feature.kind:
        case "boolean":
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "false", "1", "0"):
                return str(value).lower() in ("true", "1")
            raise ConfigError(f"{what}: allowed are true and false")
        case "enumeration":
            if str(value) not in feature.entries:
                raise ConfigError(f"{what}: the camera allows {', '.join(feature.entries)}")
            return str(value)
        case "integer" | "float":
            return _number(what, feature, value)
        case "command":
            if str(value).lower() != "true":  # text where it comes from the command line or the environment
                raise ConfigError(f"{what}: it is a command: write true to send it")
            return True
        case "string":
            return str(value)
        case _:
            raise ConfigError(f"{what}: {feature.name} is not a value that can be set")


def _number(what: str, feature: Feature, value: Value) -> float | int:
    allowed = _range(feature)
    try:
        number = float(value) if not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or (feature.kind == "integer" and number != int(number)):
        raise ConfigError(f"{what}: a {'whole number' if feature.kind == 'integer' else 'number'} is needed{allowed}")
    low, high = feature.low, feature.high
    if (low is not None and number < low) or (high is not None and number > high):
        raise ConfigError(f"{what}: out of range{allowed}")
    if feature.kind == "float":
        return number
    if feature.step and feature.step > 1 and (number - (low or 0)) % feature.step:
        raise ConfigError(f"{what}: between two steps{allowed}")
    return int(number)


def _range(feature: Feature) -> str:
    if feature.low is None or feature.high is None:
        return ""
    step = f" in steps of {feature.step:g}" if feature.step and feature.kind == "integer" else ""
    return f"; the camera allows {_plain(feature.low)} to {_plain(feature.high)}{step}"


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"
