"""Every example on the page about cameras is a file that `flawline run` accepts."""

import re
from pathlib import Path

import pytest

from flawline.camera.registry import BACKENDS, make_camera
from flawline.config.sources import load_settings

PAGE = Path(__file__).parents[2] / "docs" / "cameras.md"
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_accepted(example: str, tmp_path: Path) -> None:
    (tmp_path / "line.toml").write_text(example)
    for camera in load_settings(tmp_path / "line.toml", environ={}).cameras:
        if camera.path is not None:  # what the reader has there
            assert camera.path.is_relative_to(tmp_path)
            there = camera.path / "a.png" if camera.backend == "folder" else camera.path
            there.parent.mkdir(parents=True)
            there.touch()
        assert make_camera(camera).name == camera.name


def test_there_is_one_for_each_backend() -> None:
    assert set(re.findall(r'^backend = "(\w+)"', "".join(EXAMPLES), re.MULTILINE)) == set(BACKENDS)
