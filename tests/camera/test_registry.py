"""Keys that a backend does not use, libraries that are missing, and buffers with padded lines."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from needs import need
from structlog.testing import capture_logs

from flawline.camera.buffers import as_picture
from flawline.camera.registry import BACKENDS, USED, make_camera
from flawline.config.errors import ConfigError, ImageError
from flawline.config.settings_camera import CameraSettings

LIBRARIES = {"genicam": "viva_genicam", "pylon": "pypylon", "gentl": "harvesters"}


@pytest.mark.parametrize(
    ("backend", "keys", "refused"),
    [
        ("genicam", {"url": "rtsp://127.0.0.1/x"}, "url"),
        ("genicam", {"cti": "/x.cti"}, "cti"),
        ("pylon", {"loop": True}, "loop"),
        ("opencv", {"index": 0, "serial": "1"}, "serial"),
        ("folder", {"url": "rtsp://127.0.0.1/x"}, "url"),
        ("gentl", {"cti": "/x.cti", "path": "/x"}, "path"),
        ("gentl", {"cti": "/x.cti", "address": "10.0.0.2"}, "address"),
    ],
)
def test_a_key_that_the_backend_does_not_use_is_refused(backend: str, keys: dict[str, object], refused: str) -> None:
    settings = CameraSettings.model_validate({"name": "top", "backend": backend, **keys})
    with pytest.raises(ConfigError, match=f"camera 'top': backend '{backend}' does not use '{refused}'"):
        make_camera(settings)


@pytest.mark.parametrize("backend", ["folder", "simulated"])
def test_a_lines_file_can_be_tried_without_its_camera(backend: str, tmp_path: Path) -> None:
    """The features stay in the file; that nothing sets them is said."""
    (tmp_path / "1.png").write_bytes(b"a picture, not looked at before it is wanted")
    path = {"path": tmp_path} if backend == "folder" else {}
    settings = {"name": "top", "backend": backend, "features": {"ExposureTime": 300.0}, **path}
    with capture_logs() as said:
        make_camera(CameraSettings.model_validate(settings))
    assert [(line["event"], line["camera"]) for line in said] == [("features_not_set", "top")]


def test_every_setting_of_a_camera_is_used_by_some_backend() -> None:
    assert set(BACKENDS) == set(USED)
    assert set().union(*USED.values()) == set(CameraSettings.model_fields)


@pytest.mark.parametrize("backend", ["genicam", "pylon", "gentl"])
def test_a_device_may_say_how_long_its_transfer_takes(backend: str) -> None:
    need(find_spec(LIBRARIES[backend]), LIBRARIES[backend])
    keys = {"cti": "/x.cti"} if backend == "gentl" else {}
    settings = {"name": "top", "backend": backend, "trigger": "hardware", "transfer_ms": 8.0, **keys}
    assert make_camera(CameraSettings.model_validate(settings)).name == "top"


@pytest.mark.parametrize(
    ("backend", "library"), [("genicam", "viva_genicam"), ("pylon", "pypylon"), ("gentl", "harvesters.core")]
)
def test_a_missing_library_names_the_extra_that_brings_it(
    backend: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"flawline.camera.{backend}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"camera 'top': backend '{backend}' .*pip install 'flawline\[{backend}\]'"):
        make_camera(CameraSettings(name="top", backend=backend, cti=Path("/x.cti") if backend == "gentl" else None))


def test_buffers_are_seen_in_place_with_padded_lines() -> None:
    data = np.arange(40, dtype=np.uint8)
    view = as_picture(data, "Mono8", 4, 6, line_padding=2)
    assert np.shares_memory(view, data)
    assert view[2].tolist() == [16, 17, 18, 19, 20, 21]
    deep = as_picture(data, "Mono12", 3, 4, line_padding=4)
    assert deep.dtype == np.uint16
    assert deep[1, 0] == 12 + 256 * 13
    assert as_picture(data, "BGR8", 2, 3, line_padding=1)[1, 2].tolist() == [16, 17, 18]
    assert as_picture(data, "Mono12p", 4, 6).shape == (40,)
    with pytest.raises(ImageError, match="need 64 bytes, 40 came"):
        as_picture(data, "Mono8", 8, 8)
    with pytest.raises(ImageError, match="padding"):
        as_picture(data, "Mono12p", 2, 4, line_padding=2)
    with pytest.raises(ImageError, match="5 x 4 pixels came in 40 bytes: unpacked, and not in Mono12p"):
        as_picture(data, "Mono12p", 4, 5)
