"""What an engineer sees when the configuration is right, overridden or wrong."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.config.recipe_file import update_recipe
from flawline.config.sources import chosen_recipe, load_settings

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


def test_features_in_the_environment_keep_their_case(tmp_path: Path) -> None:
    file = write(tmp_path, TOP + "[cameras.features]\nGain = 1\n")
    env = {"FLAWLINE_CAMERAS__TOP__FEATURES__ExposureTime": "5000", "FLAWLINE_CAMERAS__TOP__FEATURES__GAIN": "2"}
    assert load_settings(file, environ=env).cameras[0].features == {"ExposureTime": "5000", "Gain": "2"}
    # Tables of their own names take the one that is there.
    assert load_settings(file, environ={"FLAWLINE_RECIPES__DEFAULT__OBJECT": "nut"}).recipes["default"].object == "nut"


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, TOP), environ={}).cameras[0].path == tmp_path / "pictures"


@pytest.mark.parametrize(
    ("text", "overrides", "env", "expected"),
    [
        (TOP + "fsp = 3\n", [], {}, "unknown key 'cameras.top.fsp'; did you mean 'fps'"),
        ('statoin = "x"\n', [], {}, "did you mean 'station'"),
        ("[recipes.default]\ntreshold = 0.5\n", [], {}, "did you mean 'threshold'"),
        ("[journal]\nkeep_days = inf\n", [], {}, "journal.keep_days: Input should be a finite number (given: inf)"),
        ("[journal]\narchive_mb = 1e308\n", [], {}, "journal.archive_mb"),  # finite, but its bytes are not
        ("[recipes.default]\nmemory_rotations = [nan]\n", [], {}, "recipes.default.memory_rotations.0"),
        (TOP + "[cameras.features]\nExposureTime = inf\n", [], {}, "cameras.top.features.ExposureTime"),
        ("", [], {"FLAWLINE_PREVIEW__FPS": "nan"}, "preview.fps"),
        ("[publish]\nhigh_water_mark = 3000000000\n", [], {}, "publish.high_water_mark"),
        ("[recipes.default]\nthreshold = 2\n", [], {}, "recipes.default.threshold"),
        ("[recipes.default]\nroi = [0, 0, 0, 5]\n", [], {}, "needs x, y >= 0"),
        ("[recipes.default]\nroi = [0, 0, 99999999999999999999, 5]\n", [], {}, "an end of at most 2147483647"),
        ("[recipes.default]\ndeadline_ms = 99999999999999999999\n", [], {}, "recipes.default.deadline_ms"),
        ('[recipes.default]\nstates_normal = ["fine"]\n', [], {}, "exactly once"),
        (
            f"[recipes.default]\nstates_normal = {['good {}'] * 3000}\n",
            [],
            {},
            "recipes.default.states_normal: Tuple should",
        ),
        (
            f"[recipes.default]\nstates_abnormal = {['bad {}'] * 65}\n",
            [],
            {},
            "recipes.default.states_abnormal: Tuple should",
        ),
        (
            f"[recipes.default]\nstates_abnormal = ['{'x' * 199}{{}}']\n",
            [],
            {},
            "states_abnormal: a sentence has 201 characters",
        ),
        (f"[recipes.default]\nignore = {[[0, 0, 1, 1]] * 257}\n", [], {}, "recipes.default.ignore: Tuple should"),
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


KEYS = '[publish]\ncurve_secret = "$CREDENTIALS_DIRECTORY/curve.secret"\n'


def test_a_command_by_hand_takes_the_keys_where_the_unit_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    file = write(tmp_path, KEYS)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, environ={})
    assert str(tmp_path / "keys/flawline") in str(caught.value)
    (tmp_path / "keys/flawline").mkdir(parents=True)
    secret = tmp_path / "keys/flawline/curve.secret"
    assert load_settings(file, environ={}).publish.curve_secret == secret
    by_set = load_settings(file, ["preview.token_file=$CREDENTIALS_DIRECTORY/preview.token"], {})
    assert by_set.preview.token_file == secret.with_name("preview.token")
    update_recipe(file, "default", {"threshold": 0.25})  # what calibrate and learn do
    assert load_settings(file, environ={}).recipes["default"].threshold == 0.25
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    assert load_settings(file, environ={}).publish.curve_secret == Path("/run/credentials/x/curve.secret")


@contextmanager
def _no_root() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_who_may_not_see_the_keys_can_still_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        file = write(Path(folder), KEYS)
        keys = Path(folder) / "keys"
        (keys / "flawline").mkdir(parents=True)
        Path(folder).chmod(0o755)
        keys.chmod(0)
        try:
            with _no_root():
                assert load_settings(file, environ={}).publish.curve_secret == keys / "flawline/curve.secret"
        finally:
            keys.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_written_file_stays_its_owners(tmp_path: Path) -> None:
    """Of a file with a camera's password, root:flawline 0640, after `sudo flawline calibrate`."""
    file = write(tmp_path, "# mine\n")
    os.chown(file, 65533, 65534)
    file.chmod(0o640)
    update_recipe(file, "default", {"threshold": 0.25})
    status = file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (65533, 65534, 0o640)


def test_a_recipe_that_would_not_load_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path, "# mine\n")
    with pytest.raises(ConfigError, match=r"flawline\.toml: recipes\.default\.threshold"):
        update_recipe(file, "default", {"threshold": 2.0})
    assert file.read_text() == "# mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["flawline.toml"]


@pytest.mark.parametrize(
    "text",
    [
        '[recipes]\ndefault = {object = "plate", threshold = 0.4}\n',
        'recipes = {default = {object = "plate"}, nut = {object = "nut"}}\n',
    ],
)
def test_a_recipe_on_one_line_becomes_a_table_where_it_is_written_to(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    before = load_settings(file, environ={}).recipes
    update_recipe(file, "default", {"threshold": 0.5, "prompt": {"region_percent": 3.0}})
    after = load_settings(file, environ={}).recipes
    assert (after["default"].object, after["default"].threshold) == ("plate", 0.5)
    assert after["default"].prompt.region_percent == 3.0
    assert after.keys() == before.keys()


@pytest.mark.parametrize("text", ['[recipes]\ndefault.object = "a"\n', 'recipes.default.object = "a"\n'])
def test_a_recipe_of_dotted_keys_is_written_or_refused_in_words(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    try:
        update_recipe(file, "default", {"threshold": 0.5, "prompt": {"region_percent": 3.0}})
    except ConfigError as error:
        assert "recipe default has to be a table of its own" in str(error)  # noqa: PT017
        assert file.read_text() == text
    else:
        recipe = load_settings(file, environ={}).recipes["default"]
        assert (recipe.object, recipe.threshold, recipe.prompt.region_percent) == ("a", 0.5, 3.0)


def test_a_recipe_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    file = write(tmp_path, "[recipes.nut]\n[recipes.default]\n")
    assert chosen_recipe(load_settings(file, environ={}), "nut", file) == Recipe()
    with pytest.raises(ConfigError, match=rf"^--recipe bolt: not in {file} \(there are: default, nut\)$"):
        chosen_recipe(load_settings(file, environ={}), "bolt", file)
    with pytest.raises(ConfigError, match=r"^--recipe bolt: not in the defaults \(there are: default\)$"):
        chosen_recipe(load_settings(environ={}), "bolt", None)
