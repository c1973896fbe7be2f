"""Settings of one camera."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from flawline.config.recipe import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)]


class SimulatedSettings(Strict):
    """The simulated line: procedural parts, some of them with defects."""

    seed: int = Field(1, ge=0, description="the same seed gives the same product and the same parts")
    defect_rate: float = Field(0.1, ge=0.0, le=1.0, description="share of parts that carry a defect")
    family: str | None = Field(None, description="family of parts of the generator; left out: drawn from the seed")
    width: int = Field(640, ge=64, le=8192, description="px")
    height: int = Field(480, ge=64, le=8192, description="px")


class GuardSettings(Strict):
    """The guard: a picture that no one should judge is answered with `bad_frame`. `cameras teach` measures the limits.

    Levels are 8-bit values of the picture that is judged.
    """

    enabled: bool = Field(True, description="look at every picture before it is judged")
    black_level: float = Field(
        8.0, ge=0.0, le=255.0, description="black: the brightest 1 % of the picture is darker than this; 0: never"
    )
    saturated_share: float = Field(
        0.9, gt=0.0, le=1.0, description="saturated: more than this share of the pixels is at 250 or above; 1: never"
    )
    sharpness: float | None = Field(
        None, gt=0.0, description="out of focus: the picture's sharpness is below this; left out: not looked at"
    )
    frozen_after: int | None = Field(
        None,
        ge=0,
        description="frozen: so many pictures in a row are the same, bit by bit; 0: never; "
        "left out: 2 for genicam, pylon and gentl, 5 for opencv's live sources, never for files and the simulated line",
    )
    width: int | None = Field(None, ge=1, description="px; a picture of another width is refused")
    height: int | None = Field(None, ge=1, description="px; a picture of another height is refused")
    pixel_format: str | None = Field(
        None, description="GenICam's name; a picture in another format (another depth) is refused"
    )


class CameraSettings(Strict):
    """One camera. Fields that a backend does not use are refused by that backend when set."""

    name: Name = Field(description="unique; part of the topics on the wire")
    backend: Literal["simulated", "folder", "genicam", "pylon", "gentl", "opencv"] = Field(
        "simulated", description="which library drives it"
    )
    recipe: Name = Field("default", description="the recipe that judges its frames until another is activated")
    trigger: Literal["free", "software", "hardware"] = Field(
        "free", description="free run, a trigger by command, or a trigger at the camera's line"
    )
    fps: float | None = Field(
        None,
        gt=0.0,
        le=1000.0,
        description="frames per second in free run; left out: the camera's own rate (folder: as fast as it is read)",
    )
    path: Path | None = Field(None, description="folder: where the pictures are; opencv: a video file")
    loop: bool = Field(False, description="folder, opencv file: start again at the end")
    url: str | None = Field(None, description="opencv: rtsp:// or http:// address, or a /dev/video device")
    serial: str | None = Field(None, description="device chosen by serial number")
    address: str | None = Field(None, description="device chosen by IP or MAC address")
    user_name: str | None = Field(None, description="device chosen by its DeviceUserID")
    index: int | None = Field(
        None, ge=0, description="device chosen by its place in `cameras list`; opencv: /dev/video{index}"
    )
    cti: Path | None = Field(None, description="gentl: the producer's .cti file")
    features: dict[str, float | int | bool | str] = Field(
        default_factory=dict,
        description="GenICam features by their standard names, set in this order at every open; `Name[Entry]`: under "
        "that entry of its selector",
    )
    trigger_timeout_ms: int = Field(
        2000,
        ge=1,
        description="a trigger whose frame has not come by then is answered with `camera_fault`, and the camera is "
        "opened anew; a recipe's shorter deadline_ms goes before",
    )
    transfer_ms: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="triggered cameras: so long after its exposure lies a frame's `t_grab`; a part that is announced, "
        "or a trigger that is sent, in that time is the next frame's",
    )
    stall_s: float = Field(
        5.0,
        ge=0.5,
        le=3600.0,
        description="free run: a camera that sends no frame for so long is opened anew; genicam, pylon, gentl: two "
        "frames of `fps` and two exposures are waited for, where that is longer",
    )
    guard: GuardSettings = Field(default_factory=GuardSettings, description="which pictures are worth judging")
    simulated: SimulatedSettings = Field(default_factory=SimulatedSettings, description="the simulated line")
