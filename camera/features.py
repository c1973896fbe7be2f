"""Camera features by their GenICam names: checked against the camera's own limits, then written."""

import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from flawline.config.errors import ConfigError

Kind = Literal["integer", "float", "enumeration", "boolean", "string", "command", "other"]
Value = float | int | bool | str

# The names that the standard had before version 2, where unit and meaning are the same.
_OLDER_NAMES = {"ExposureTime": "ExposureTimeAbs", "AcquisitionFrameRate": "AcquisitionFrameRateAbs"}
_AUTOMATIC = {"ExposureTime": "ExposureAuto", "Gain": "GainAuto", "BalanceRatio": "BalanceWhiteAuto"}
_SELECTED = re.compile(r"(\w+)\[(\w+)\]")
_SET_BY_ITSELF = re.compile(rf"({'|'.join(_AUTOMATIC)})(Abs|Raw)?")


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


def apply(
    camera: str,
    features: FeatureMap,
    name: str,
    value: Value,
    key: str | None = None,
    named: Collection[str] = (),
) -> Kind:
    """Check a value against the camera's limits and write it; returns the feature's kind. `key` names it in errors.

    `BalanceRatio[Red]` is the feature under that entry of its selector, which is as before afterwards.
    What the camera would set by itself (ExposureAuto, ...) is turned off before, unless it is one of `named`: the
    features that the settings tell.
    """
    key = key or f"features.{name}"
    if selected := _SELECTED.fullmatch(name):
        name, entry = selected.groups()
        selector = _selector(features, name)
        if selector is None:
            raise ConfigError(f"camera {camera!r}: {key}: the camera has no selector for {name!r}")
        before = features.read(selector)
        apply(camera, features, selector, entry, key)
        try:
            return apply(camera, features, name, value, key, named)
        finally:
            if before is not None and str(before) != entry:
                apply(camera, features, selector, before, key)
    auto = _automatic(name)
    if auto is not None and auto not in named:
        _turn_off(features, auto)
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
            why = f", {auto} being {features.read(auto)!r}" if auto is not None and features.feature(auto) else ""
            raise ConfigError(
                f"camera {camera!r}: {key} = {value!r}: the camera does not let {feature.name} be set now{why}"
            )
    else:
        features.write(feature, checked)
    return feature.kind


def _selector(features: FeatureMap, name: str) -> str | None:
    """The feature that selects whose `name` is meant: BalanceRatioSelector for BalanceRatio and BalanceRatioRaw,
    TriggerSelector for TriggerSource. That is how the standard names them."""
    ends = [len(name), *(end for end in range(len(name) - 1, 0, -1) if name[end].isupper())]
    candidates = (f"{name[:end]}Selector" for end in ends)
    return next((candidate for candidate in candidates if features.feature(candidate) is not None), None)


def _automatic(name: str) -> str | None:
    """The feature by which the camera sets this one itself."""
    found = _SET_BY_ITSELF.fullmatch(name)
    return _AUTOMATIC[found[1]] if found else None


def _turn_off(features: FeatureMap, name: str) -> None:
    feature = features.feature(name)
    if feature is not None and feature.writable and "Off" in feature.entries and features.read(name) != "Off":
        features.write(feature, "Off")


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
