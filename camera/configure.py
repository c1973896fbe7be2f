"""The order in which a camera is told its settings: what others depend on or are locked by goes first."""

import contextlib
from collections.abc import Mapping

from flawline.camera.features import FeatureMap, Value, apply
from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings

_RATES = frozenset({"AcquisitionFrameRate", "AcquisitionFrameRateAbs"})
_IF_POSSIBLE = frozenset({"TriggerMode", "AcquisitionFrameRateEnable"})
"""What only makes the camera ready for the rest: one that runs freely need not let them be written."""


def configure(camera: CameraSettings, features: FeatureMap) -> None:
    """Write what the settings say, in the order that cameras demand.

    First every trigger's mode Off, because a camera that waits for a trigger, as the last run left it,
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
    named = {name.partition("[")[0] for name in table}
    for name, value in table.items():
        if name == "TriggerMode":
            continue
        if apply(camera.name, features, name, value, named=named) == "command":
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
    _turn_all_triggers_off(features)
    for name, value in ready.items():
        if name in _IF_POSSIBLE:
            feature = features.feature(name)
            if feature is None or not feature.writable:
                continue
        apply(camera, features, name, value)


def _turn_all_triggers_off(features: FeatureMap) -> None:
    """A viewer may have left AcquisitionStart or FrameBurstStart on: the camera would wait for that one for ever."""
    selector = features.feature("TriggerSelector")
    if selector is None or not selector.writable:
        return
    before = features.read("TriggerSelector")
    for entry in selector.entries:
        with contextlib.suppress(Exception):  # listed, but not to be had now: in the vendor's own words
            features.write(selector, entry)
            mode = features.feature("TriggerMode")
            if mode is not None and mode.writable and "Off" in mode.entries and features.read("TriggerMode") != "Off":
                features.write(mode, "Off")
    if before is not None:
        features.write(selector, before)


def _offers(features: FeatureMap, name: str, entry: str) -> bool:
    feature = features.feature(name)
    return feature is not None and entry in feature.entries
