"""The settings tree of `flawline run`. Where it comes from is in `sources.py`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from platformdirs import user_state_path
from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from flawline.config.recipe import Recipe, Strict
from flawline.config.settings_camera import CameraSettings, Name
from flawline.config.settings_preview import PreviewSettings

DEVICES = r"^(auto|cpu|cuda(:(0|[1-9]\d{0,2}))?)$"
"""What a device may be called, in the file, on the command line and in the Python API."""


class ModelSettings(Strict):
    """The model bundle and where it runs."""

    bundle: str = Field("demo", min_length=1, description="a bundle's name, or its folder")
    device: str = Field(
        "auto", pattern=DEVICES, description="auto, cpu, cuda, cuda:N; auto: cuda when there is one, else cpu"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="arithmetic of the encoders; `auto`: fp32 on the CPU, on CUDA what the bundle names, else bf16 or, "
        "where that is only emulated, fp16",
    )
    threads: int | None = Field(
        None, ge=1, le=256, description="CPU threads of the worker; left out: all cores but one, at least one"
    )


class WorkerSettings(Strict):
    """The inference process: queues and limits."""

    queue_depth: int = Field(8, ge=1, le=256, description="frames that may wait, per camera")
    max_frame_mpx: float = Field(
        25.0, gt=0.0, le=400.0, description="largest frame, megapixels: fixes the ring's slots"
    )
    start_limit_s: float = Field(300.0, gt=0.0, description="loading and warming up may take this long")
    job_limit_s: float = Field(
        60.0, gt=0.0, description="one inspection may take this long, then the worker is replaced"
    )
    ping_limit_s: float = Field(10.0, gt=0.0, description="a ping must be answered within this time")
    restarts_per_minute: int = Field(5, ge=0, description="more than this and the agent says unhealthy")
    drain_s: float = Field(10.0, ge=0.0, description="at a stop, accepted frames are still judged for so long")
    engine: str = Field(
        "flawline.models.collaboration:CollaborationEngine",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="module:class that judges; flawline.models.noop:NoopEngine finds the same square in every picture",
    )


def _address(text: str) -> str:
    """Raises ValueError for what is no address: ZeroMQ takes some of that, and binds another."""
    try:
        parts = urlsplit(text)
        good = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port) and parts.path == ""
    except ValueError:
        good = False
    if not good and not (text.startswith("ipc://") and len(text) > len("ipc://")):
        raise ValueError(f"{text!r} is no address; write tcp://HOST:PORT (1 to 65535) or ipc://PATH")
    return text


Address = Annotated[str, AfterValidator(_address)]


class PublishSettings(Strict):
    """The socket that verdicts and masks go out on (ZeroMQ PUB)."""

    endpoint: Address = Field("tcp://127.0.0.1:5555", description="address to bind")
    masks: Literal["fail", "always", "never"] = Field("fail", description="which verdicts carry a mask")
    encoding: Literal["png", "coco_rle"] = Field("png", description="how masks are written")
    high_water_mark: int = Field(
        1000,
        ge=1,
        le=2**31 - 1,  # ZeroMQ's int
        description="messages kept for one slow subscriber; beyond that it loses the newest ones",
    )
    curve_secret: Path | None = Field(None, description="file with the server's CURVE secret key (also for control)")
    curve_clients: Path | None = Field(None, description="folder of the allowed clients' public keys")
    insecure: bool = Field(False, description="allow an address other than loopback without CURVE")


class ControlSettings(Strict):
    """The socket that takes commands (ZeroMQ ROUTER)."""

    endpoint: Address = Field("tcp://127.0.0.1:5556", description="address to bind")
    max_message_bytes: int = Field(65536, ge=1024, le=2**31 - 1, description="a larger request is refused")
    curve_secret: Path | None = Field(None, description="file with the server's CURVE secret key; default: publish's")
    curve_clients: Path | None = Field(None, description="folder of the allowed clients' keys; default: publish's")
    insecure: bool = Field(False, description="allow an address other than loopback without CURVE")


class JournalSettings(Strict):
    """The record of every verdict (SQLite)."""

    path: Path = Field(
        default_factory=lambda: user_state_path("flawline"), description="folder; one sub-folder per station"
    )
    durability: Literal["process", "power"] = Field(
        "process",
        description="what a published verdict survives: `process` death, or `power` loss too (slower)",
    )
    keep_days: float = Field(90.0, gt=0.0, le=1e6, description="verdicts older than this are dropped")
    keep_verdicts: int = Field(5_000_000, ge=1000, description="at most this many verdicts are kept")
    keep_mb: float = Field(4000.0, ge=1.0, le=1e9, description="of verdicts; the oldest go first")
    archive: Literal["fail", "never"] = Field("fail", description="which pictures are kept beside the journal")
    archive_good_every: int = Field(200, ge=0, description="of the good ones, every so many-th is kept; 0: none")
    archive_format: Literal["jpg", "png"] = Field("jpg", description="how they are kept; png is exact, and slow")
    archive_mb: float = Field(2000.0, ge=0.0, le=1e9, description="budget of the pictures; the oldest go first")
    min_free_mb: float = Field(500.0, ge=0.0, le=1e9, description="below this free space no picture is archived")


class LogSettings(Strict):
    """The log on stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is written")
    format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else json")


class Settings(BaseSettings):
    """Everything that `flawline run` can be told."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    station: Name = Field("line1", description="this station's name; part of every topic")
    cameras: tuple[CameraSettings, ...] = Field(
        (CameraSettings(name="sim", backend="simulated", fps=5.0),),
        min_length=1,
        description="the cameras; left out: one simulated line",
    )
    recipes: dict[Name, Recipe] = Field(default_factory=lambda: {"default": Recipe()}, description="by name")
    model: ModelSettings = Field(default_factory=ModelSettings, description="model bundle")
    worker: WorkerSettings = Field(default_factory=WorkerSettings, description="inference process")
    publish: PublishSettings = Field(default_factory=PublishSettings, description="verdict socket")
    control: ControlSettings = Field(default_factory=ControlSettings, description="command socket")
    journal: JournalSettings = Field(default_factory=JournalSettings, description="verdict journal")
    preview: PreviewSettings = Field(default_factory=PreviewSettings, description="operators' page")
    log: LogSettings = Field(default_factory=LogSettings, description="log")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `sources.load_settings` hands over: it reads file, environment and --set in one known order."""
        return (init_settings,)

    @field_validator("cameras", mode="before")
    @classmethod
    def _cameras_by_name(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return tuple({"name": name, **table} for name, table in value.items())
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [camera.name for camera in self.cameras]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"cameras: two cameras are called {name!r}")
        for camera in self.cameras:
            if camera.recipe not in self.recipes:
                known = ", ".join(sorted(self.recipes)) or "none"
                raise ValueError(f"cameras.{camera.name}.recipe: no recipe {camera.recipe!r} (there are: {known})")
        return self
