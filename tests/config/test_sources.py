"""What an engineer sees when the configuration is right, overridden or wrong."""

from pathlib import Path

import pytest

from flawline.config.errors import ConfigError
from flawline.config.sources import load_settings

TOP = '[[cameras]]\nname = "top"\nbackend = "folder"\npath = "pictures"\nfps = 5.0\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "flawline.toml"
    file.write_text(text)
    return file


def test_defaults_need_no_file() -> None:
    settings = load_settings(environ={})
    assert settings.station == "line1"
    assert settings.publish.endpoint == "tcp://127.0.0.1:5555"


def test_set_beats_environment_beats_file(tmp_path: Path) -> None:
    file = write(tmp_path, TOP)
    env = {"FLAWLINE_CAMERAS__TOP__FPS": "6"}
    assert load_settings(file, environ={}).cameras[0].fps == 5
    assert load_settings(file, environ=env).cameras[0].fps == 6
    assert load_settings(file, ["cameras.top.fps=7"], env).cameras[0].fps == 7


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, TOP), environ={}).cameras[0].path == tmp_path / "pictures"


@pytest.mark.parametrize(
    ("text", "overrides", "env", "expected"),
    [
        (TOP + "fsp = 3\n", [], {}, "unknown key 'cameras.top.fsp'; did you mean 'fps'"),
        ('statoin = "x"\n', [], {}, "did you mean 'station'"),
        ("[recipes.default]\ntreshold = 0.5\n", [], {}, "did you mean 'threshold'"),
        ("[recipes.default]\nthreshold = 2\n", [], {}, "recipes.default.threshold"),
        ("[recipes.default]\nroi = [0, 0, 0, 5]\n", [], {}, "needs x, y >= 0"),
        ('[recipes.default]\nstates_normal = ["fine"]\n', [], {}, "exactly once"),
        ("x =\n", [], {}, "is not valid TOML"),
        (TOP + 'recipe = "b"\n', [], {}, "no recipe 'b'"),
        (TOP + TOP, [], {}, "two cameras are called 'top'"),
        ("", ["publish.endpont=x"], {}, "did you mean 'endpoint'"),
        ("", ["model=3"], {}, "is a table"),
        ("", ["station"], {}, "a.b=value"),
        ("", [], {"FLAWLINE_MODLE__DEVICE": "cpu"}, "FLAWLINE_MODLE__DEVICE"),
    ],
)
def test_wrong_configuration_is_one_clear_line(
    tmp_path: Path, text: str, overrides: list[str], env: dict[str, str], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text), overrides, env)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
