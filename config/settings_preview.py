"""Settings of the operators' preview."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flawline.config.recipe import Strict

Port = Annotated[int, Field(ge=1, le=65535)]
TimeOfDay = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]


class PreviewSettings(Strict):
    """The operators' page, on one HTTP port with health and metrics."""

    enabled: bool = Field(True, description="serve the page, health and metrics")
    host: str = Field("127.0.0.1", min_length=1, description="address to bind")
    port: int = Field(8080, ge=1, le=65535, description="port to bind")
    token_file: Path | None = Field(
        None, description="file with the token that viewers must show; needed for an address other than loopback"
    )
    insecure: bool = Field(False, description="allow an address other than loopback without a token")
    allow_origins: tuple[str, ...] = Field(
        ("*",),
        description="web pages of other origins that may watch by WHEP (CORS), each by its origin; `*`: all; "
        "empty: only our own page",
    )
    codec: Literal["vp8", "h264"] = Field(
        "vp8", description="how the video is encoded; every browser plays vp8, also one that never was online"
    )
    long_side: int = Field(960, ge=160, le=3840, description="longer side of the preview, px; never enlarged")
    fps: float = Field(10.0, ge=0.5, le=30.0, description="most pictures a second and camera that are shown")
    bitrate_kbps: int = Field(2500, ge=100, le=50_000, description="of one camera's video, kbit/s")
    max_viewers: int = Field(16, ge=1, le=256, description="videos that may be watched at once, all cameras together")
    max_pages: int = Field(32, ge=1, le=1024, description="pages that may receive live values at once")
    addresses: tuple[str, ...] = Field(
        (), description="addresses that viewers reach this machine by; left out: `host`, or all where `host` is any"
    )
    udp_ports: tuple[Port, Port] | None = Field(
        None, description="first and last UDP port of the video, for firewalls; left out: any free port"
    )
    fails_kept: int = Field(24, ge=1, le=200, description="last failed parts kept with their pictures, in memory")
    shifts: tuple[TimeOfDay, ...] = Field(
        ("06:00", "14:00", "22:00"), description="local times at which the page's counters start again; empty: never"
    )

    @model_validator(mode="after")
    def _ports_in_order(self) -> Self:
        if self.udp_ports is not None and self.udp_ports[0] > self.udp_ports[1]:
            raise ValueError("udp_ports: the first port is above the last one")
        return self
