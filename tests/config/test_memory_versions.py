"""The way back of a recipe's memories, where several configurations lie in one folder and where one does."""

import tomllib
from pathlib import Path

import pytest

from flawline.config.errors import ConfigError
from flawline.config.memory_versions import FOLDER, activate, next_file, roll_back


def memory_of(config: Path) -> str | None:
    found: str | None = tomllib.loads(config.read_text())["recipes"]["plates"].get("memory")
    return found


def station(folder: Path, name: str) -> Path:
    file = folder / f"{name}.toml"
    file.write_text("[recipes.default]\n[recipes.plates]\n")
    return file


def learn(config: Path, sha256: str) -> str:
    """As `flawline learn` does with what it has learnt; returns what stands in the configuration then."""
    path = next_file(config.parent / FOLDER, "plates", sha256 * 12)
    path.parent.mkdir(exist_ok=True)
    path.write_text(sha256)
    former = memory_of(config)
    activate(config, "plates", path, None if former is None else str(config.parent / former))
    after = memory_of(config)
    assert after is not None
    return after


def back(config: Path) -> str | None:
    current = memory_of(config)
    assert current is not None
    roll_back(config, "plates", config.parent / current)
    return memory_of(config)


def test_each_configuration_goes_back_to_its_own_memories(tmp_path: Path) -> None:
    one, two = station(tmp_path, "line1"), station(tmp_path, "line2")
    first = learn(one, "a")
    theirs = learn(two, "b")
    learn(one, "c")
    assert back(two) is None
    assert back(one) == first
    assert back(one) is None
    assert theirs != first


def test_by_shared_numbers_there_is_no_way_back(tmp_path: Path) -> None:
    one, two = station(tmp_path, "line1"), station(tmp_path, "line2")
    learn(one, "a")
    path = tmp_path / learn(one, "b")
    two.write_text(f'[recipes.default]\n[recipes.plates]\nmemory = "{path}"\n')  # by hand
    before = two.read_text()
    with pytest.raises(ConfigError, match=r"line2\.toml: nothing tells what recipes\.plates was judged by before"):
        back(two)
    assert two.read_text() == before


def test_one_alone_goes_by_its_numbers_and_by_a_history_of_the_old_name(tmp_path: Path) -> None:
    line = station(tmp_path, "line")
    (tmp_path / ".line.toml.swp.toml").touch()  # what an editor leaves is no station
    first, second, third = (learn(line, sha256) for sha256 in "abc")
    history = tmp_path / FOLDER / "line.plates.history"
    history.rename(history.with_name("plates.history"))
    (tmp_path / FOLDER / "plates.history").write_text(f"{tmp_path / first}\n")  # says another than the numbers
    assert back(line) == first
    line.write_text(line.read_text().replace(first, third))
    assert back(line) == second
