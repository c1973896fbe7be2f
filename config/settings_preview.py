"""Settings of the operators' preview."""

from pydantic import Field

from flawline.config.recipe import Strict


class PreviewSettings(Strict):
    """The operators' page, on one HTTP port with health and metrics."""

    enabled: bool = Field(True, description="serve the page")
    host: str = Field("127.0.0.1", description="address to bind")
    port: int = Field(8080, ge=1, le=65535, description="port to bind")
