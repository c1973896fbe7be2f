"""`flawline cameras`: what is connected, one picture, and the guard's limits from good pictures."""

import json
import time
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import tomli_w
from numpy.typing import NDArray
from pydantic import ValidationError

from flawline.camera.camera import Camera, EndOfFrames
from flawline.camera.discovery import Device
from flawline.camera.folder import list_pictures, read_picture
from flawline.camera.frame import Frame
from flawline.camera.guard import teach
from flawline.camera.pixel_format import depth_note
from flawline.camera.pixels import to_rgb8
from flawline.camera.registry import load_backend, make_camera
from flawline.config.errors import CameraError, ConfigError, FlawlineError, ImageError
from flawline.config.logging import set_up_logging
from flawline.config.settings import LogSettings
from flawline.config.settings_camera import CameraSettings
from flawline.config.sources import explain, load_settings

DEVICE_BACKENDS = ("genicam", "pylon", "gentl", "opencv")


@click.group()
def cameras() -> None:
    """See what is connected, take one picture, teach the picture guard."""
    set_up_logging(LogSettings(level="warning"))  # on stderr: stdout is for the answer


@cameras.command("list")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
@click.option("--backend", "only", type=click.Choice(DEVICE_BACKENDS), help="ask this one only")
@click.option("--cti", type=click.Path(path_type=Path), help="a GenTL producer to ask")
def list_cameras(as_json: bool, only: str | None, cti: Path | None) -> None:
    """Show every camera that the installed backends see."""
    found: list[Device] = []
    for backend in (only,) if only else DEVICE_BACKENDS:
        try:
            found += ask_backend(backend, cti)
        except FlawlineError as error:
            if only or (backend == "gentl" and cti):
                raise
            click.echo(f"{backend}: not asked: {error}", err=True)
    if as_json:
        for device in found:
            click.echo(json.dumps(device.table()))
        return
    if not found:
        click.echo("no camera answers")
        return
    rows = [("backend", "index", "camera", "serial", "user name", "address", "MAC", "access")]
    for device in found:
        what = f"{device.vendor} {device.model}".strip()
        names = (device.serial, device.user_name, device.address, device.mac, device.access)
        rows.append((device.backend, str(device.index), what, *names))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def ask_backend(backend: str, cti: Path | None = None) -> list[Device]:
    """What one backend sees. Raises ConfigError where its library or its producer is missing."""
    if backend == "gentl" and cti is None:
        raise ConfigError("name the producer with --cti FILE")
    module = load_backend(backend)
    devices: list[Device] = module.list_devices(cti) if backend == "gentl" else module.list_devices()
    return devices


@cameras.command()
@click.argument("camera", required=False)
@click.option("--config", "file", type=click.Path(path_type=Path), help="the TOML file that describes CAMERA")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="override one key of the file")
@click.option("--backend", type=click.Choice(("folder", *DEVICE_BACKENDS)), help="without a file: this backend")
@click.option("--serial", help="without a file: the device's serial number")
@click.option("--address", help="without a file: the device's IP or MAC address")
@click.option("--user-name", help="without a file: the device's DeviceUserID")
@click.option("--index", type=click.IntRange(min=0), help="without a file: the device's place in the list")
@click.option("--url", help="without a file, opencv: stream or /dev/video device")
@click.option("--path", type=click.Path(path_type=Path), help="without a file: folder, or opencv: video file")
@click.option("--cti", type=click.Path(path_type=Path), help="without a file, gentl: the producer")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="where the picture goes (PNG)")
@click.option("--timeout", "timeout_s", default=5.0, show_default=True, help="wait for the frame so long, in seconds")
def snap(
    camera: str | None, file: Path | None, overrides: tuple[str, ...], out: Path, timeout_s: float, **choice: Any
) -> None:
    """Take one picture, of CAMERA in the file, or of a device named by its backend and serial number or address."""
    given = {key: value for key, value in choice.items() if value is not None}
    if file is not None or not given:
        settings = camera_settings(file, overrides, camera, given)
    else:
        try:
            settings = CameraSettings.model_validate({"name": camera or "snap", **given})
        except ValidationError as error:
            raise ConfigError(explain(error, CameraSettings, "cameras snap", [])) from error
    with make_camera(settings) as source:
        picture, frame = take(source, settings, timeout_s)
    save(out, picture)
    height, width = frame.size
    click.echo(f"{out}: frame {frame.frame_id}, {width} x {height}, {frame.pixel_format}")
    for note in filter(None, (source.note, depth_note(frame.pixel_format))):
        click.echo(note, err=True)


def camera_settings(
    file: Path | None, overrides: tuple[str, ...], name: str | None, given: dict[str, Any]
) -> CameraSettings:
    """The camera of that name in the file; the only one where no name is given."""
    if file is None:
        raise ConfigError("name a camera with --config FILE CAMERA, or a device with --backend")
    if given:
        raise ConfigError(f"--{next(iter(given)).replace('_', '-')}: the file says it; change it with --set")
    cameras_there = load_settings(file, overrides).cameras
    known = ", ".join(camera.name for camera in cameras_there)
    fitting = [camera for camera in cameras_there if name in (None, camera.name)]
    if not fitting:
        raise ConfigError(f"{file}: there is no camera {name!r} (there are: {known})")
    if len(fitting) > 1:
        raise ConfigError(f"{file}: name one of its cameras: {known}")
    return fitting[0]


def take(source: Camera, settings: CameraSettings, timeout_s: float) -> tuple[NDArray[np.uint8], Frame]:
    """One picture, (H, W, 3) uint8 RGB, of an open camera, and its frame. Faulty frames are passed over.

    Raises CameraError where none comes within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    trouble = {"free": "is its stream blocked?", "software": "", "hardware": "it waits for its line"}
    fault = trouble[settings.trigger]
    if settings.trigger == "software":
        source.await_readiness()
        source.trigger()
    while time.monotonic() < deadline:
        try:
            frame = source.grab(0.25)
        except EndOfFrames:
            break
        if frame is None:
            continue
        if frame.pixels is None:
            fault = frame.fault or fault
            continue
        picture = np.empty((*frame.size, 3), np.uint8)
        to_rgb8(frame.pixels, frame.pixel_format, picture)
        return picture, frame
    raise CameraError(f"camera {settings.name!r}: no picture within {timeout_s:g} s{f': {fault}' if fault else ''}")


def save(out: Path, picture: NDArray[np.uint8]) -> None:
    """Write (H, W, 3) RGB to a file by its suffix. Raises ConfigError naming the file."""
    try:
        written = cv2.imwrite(str(out), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise ConfigError(f"--out {out}: {error.err}") from error
    if not written:
        raise ConfigError(f"--out {out}: cannot be written")


@cameras.command("teach")
@click.argument("camera", required=False)
@click.option("--config", "file", type=click.Path(path_type=Path), required=True, help="the file that describes CAMERA")
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="override one key of the file")
@click.option("--frames", default=20, show_default=True, type=click.IntRange(min=3), help="so many good frames")
@click.option("--good", type=click.Path(path_type=Path), help="take the good pictures from this folder instead")
@click.option("--timeout", "timeout_s", default=30.0, show_default=True, help="wait for each frame so long, in seconds")
def teach_guard(
    camera: str | None, file: Path, overrides: tuple[str, ...], frames: int, good: Path | None, timeout_s: float
) -> None:
    """Measure what good pictures of CAMERA are like, and print the guard's limits to put into the file.

    Good parts, in focus, under the line's own light.
    """
    settings = camera_settings(file, overrides, camera, {})
    if good is not None:
        pictures = list_pictures(good)
        if not pictures:
            raise ConfigError(f"--good {good}: holds no pictures")
        limits = teach(_from_file(path) for path in pictures)
        if settings.backend != "folder":  # a file's format need not be the camera's
            limits = limits.model_copy(update={"pixel_format": None})
    else:
        with make_camera(settings) as source:
            taken = (take(source, settings, timeout_s) for _ in range(frames))
            limits = teach((picture, frame.pixel_format) for picture, frame in taken)
    click.echo(f"# below the [[cameras]] table of {settings.name!r}")
    click.echo(
        tomli_w.dumps({"cameras": {"guard": limits.model_dump(exclude_none=True, exclude_defaults=True)}}), nl=False
    )


def _from_file(path: Path) -> tuple[NDArray[np.uint8], str]:
    pixels, pixel_format = read_picture(path)
    picture = np.empty((*pixels.shape[:2], 3), np.uint8)
    try:
        to_rgb8(pixels, pixel_format, picture)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    return picture, pixel_format
