"""`flawline learn` on files: what it writes, what it says, and the way back."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_bundle import write_tiny_bundle

from flawline.agent.cli import cli
from flawline.config.errors import ConfigError, FlawlineError, ImageError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def line(tmp_path: Path, bundle: Path) -> Path:
    """A configuration with a comment, and six good parts in `good/`."""
    file = tmp_path / "line.toml"
    recipes = '# the press\n[recipes.default]\n[recipes.plates]\nobject = "plate"  # words\n'
    file.write_text(f'{recipes}[model]\nbundle = "{bundle}"\ndevice = "cpu"\n')
    for number in range(6):
        write_part(tmp_path / "good" / f"{number}.png", number)
    return file


def write_part(path: Path, number: int, *, scratched: bool = False) -> None:
    picture = np.random.default_rng(number).normal(120, 6, (64, 64, 3))
    if scratched:
        picture[8:24, 44:60] = (255, 0, 0)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)


def learn(file: Path, *options: str) -> Any:
    """What `flawline learn` prints. Raises what it raises."""
    command = ["learn", "--config", str(file), "--recipe", "plates", *options]
    done = CliRunner().invoke(cli, command, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def memory_of(file: Path) -> str | None:
    recipe: dict[str, Any] = tomllib.loads(file.read_text())["recipes"]["plates"]
    return recipe.get("memory")


def test_versions_are_kept_and_taken_back(line: Path) -> None:
    good = line.parent / "good"
    first = json.loads(learn(line, "--good", str(good), "--json"))
    assert memory_of(line) == f"memory/plates.0001.{first['memory_sha256'][:12]}.safetensors"
    assert line.read_text().startswith("# the press\n")
    again = json.loads(learn(line, "--good", str(good), "--json"))
    assert again["memory_sha256"] == first["memory_sha256"]
    assert len(list((line.parent / "memory").glob("*.safetensors"))) == 1
    write_part(good / "6.png", 6)
    second = json.loads(learn(line, "--good", str(good), "--json"))
    assert second["memory_sha256"] != first["memory_sha256"]
    assert memory_of(line) == f"memory/plates.0002.{second['memory_sha256'][:12]}.safetensors"
    assert "0001" in learn(line, "--rollback")
    assert memory_of(line) == f"memory/plates.0001.{first['memory_sha256'][:12]}.safetensors"
    assert "words alone" in learn(line, "--rollback")
    assert memory_of(line) is None
    with pytest.raises(ConfigError, match=r"recipes\.plates has no memory"):
        learn(line, "--rollback")


def test_a_memory_is_learnt_at_the_precision_that_is_asked_for(line: Path) -> None:
    good = ["--good", str(line.parent / "good"), "--json"]
    full, half, again = (learn(line, *good, *more) for more in ([], ["--precision", "bf16"], ["--precision", "fp32"]))
    assert json.loads(full)["memory_sha256"] == json.loads(again)["memory_sha256"]
    assert json.loads(full)["memory_sha256"] != json.loads(half)["memory_sha256"]


def test_out_overwrites_nothing(line: Path) -> None:
    good, out = line.parent / "good", line.parent / "plates.safetensors"
    learn(line, "--good", str(good), "--out", str(out))
    learn(line, "--good", str(good), "--out", str(out))  # the same once more is no other memory
    first, before = out.read_bytes(), line.read_text()
    write_part(good / "6.png", 6)
    with pytest.raises(ConfigError, match=r"plates\.safetensors: holds another memory"):
        learn(line, "--good", str(good), "--out", str(out))
    assert out.read_bytes() == first
    other = line.parent / "notes.txt"
    other.write_text("not to be lost")
    with pytest.raises(ConfigError, match=r"notes\.txt: is there already, and no memory"):
        learn(line, "--good", str(good), "--out", str(other))
    assert (other.read_text(), line.read_text()) == ("not to be lost", before)


def test_the_way_back_leads_to_what_was_in_use(line: Path) -> None:
    """Not to a memory that was taken back already, and also where an earlier one came into use again."""
    good = line.parent / "good"

    def learnt() -> str | None:
        learn(line, "--good", str(good))
        return memory_of(line)

    first = learnt()
    write_part(good / "6.png", 6)
    learnt()
    learn(line, "--rollback")
    assert memory_of(line) == first
    write_part(good / "7.png", 7)
    third = learnt()
    assert third is not None
    assert "0003" in third
    learn(line, "--rollback")
    assert memory_of(line) == first
    (good / "7.png").unlink()
    second = learnt()
    (good / "6.png").unlink()
    assert learnt() == first
    learn(line, "--rollback")
    assert memory_of(line) == second
    learn(line, "--rollback")
    assert memory_of(line) == first
    learn(line, "--rollback")
    assert memory_of(line) is None


def test_a_defective_part_and_a_double_are_named(line: Path) -> None:
    good = line.parent / "good"
    write_part(good / "scratched.png", 7, scratched=True)
    write_part(good / "double.png", 0)
    said = learn(line, "--good", str(good))
    assert "left out, unlike the other good parts: scratched.png" in said
    assert "the same picture again: double.png" in said
    assert "learnt 6 good parts" in said
    assert "learnt 7 good parts" in learn(line, "--good", str(good), "--keep-all")


def test_one_picture_is_learnt_with_a_note(line: Path) -> None:
    for number in range(1, 6):
        (line.parent / "good" / f"{number}.png").unlink()
    assert "the bundle's own scale is used" in learn(line, "--good", str(line.parent / "good"))


@pytest.mark.parametrize(
    ("name", "picture", "kind", "said"),
    [
        ("small.png", np.zeros((32, 64, 3), np.uint8), ImageError, r"small\.png: is 64 x 32 pixels"),
        ("deep.png", np.zeros((64, 64), np.uint16), ImageError, r"deep\.png: is Mono16"),
    ],
)
def test_pictures_that_do_not_belong_together_are_refused(
    line: Path, name: str, picture: Any, kind: type[FlawlineError], said: str
) -> None:
    Image.fromarray(picture).save(line.parent / "good" / name)
    with pytest.raises(kind, match=said):
        learn(line, "--good", str(line.parent / "good"))
    assert memory_of(line) is None


def test_nothing_to_learn_from_is_said(line: Path) -> None:
    (line.parent / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        learn(line, "--good", str(line.parent / "empty"))
    with pytest.raises(ConfigError, match="--good: name the folder"):
        learn(line)


def test_words_that_would_reject_the_good_parts_are_told(line: Path) -> None:
    """The recipe's own threshold decides: at 0 every part reaches it, at 1 none; with no say they don't matter."""
    said = {}
    for rules in ("threshold = 0.0", "threshold = 1.0", "threshold = 0.0\nmemory_share = 1.0"):
        file = line.with_name("other.toml")
        file.write_text(line.read_text().replace('object = "plate"  # words\n', f"{rules}\n"))
        said[rules] = " ".join(json.loads(learn(file, "--good", str(line.parent / "good"), "--json"))["notes"])
    told, silent, none = said.values()
    assert "by words alone 6 of these good parts reach the threshold" in told
    assert "recipes.plates.memory_share, now 0.7" in told
    assert "memory_share" not in silent + none


def test_a_recipe_without_an_object_is_measured_with_its_memory(line: Path) -> None:
    """Not under the class's name, which it was not learnt with; what cannot run with a memory is left out in words."""
    line.write_text(line.read_text().replace('object = "plate"  # words\n', ""))
    learn(line, "--good", str(line.parent / "good"))
    root = line.parent / "data"
    for number in range(2):
        for kind in ("good", "scratch"):
            folder = root / "board" / "test" / kind
            folder.mkdir(parents=True, exist_ok=True)
            write_part(folder / f"{number}.png", 20 + number, scratched=kind == "scratch")
        mask = np.zeros((64, 64), np.uint8)
        mask[8:24, 44:60] = 255
        truth = root / "board" / "ground_truth" / "scratch" / f"{number}_mask.png"
        truth.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(truth)
    asked = ["--dataset", "folder", "--root", str(root), "--methods", "clip,windows", "--size", "64"]
    out = line.parent / "out"
    command = ["evaluate", *asked, "--config", str(line), "--recipe", "plates", "--out", str(out)]
    done = CliRunner().invoke(cli, command, standalone_mode=False)
    assert done.exception is None
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["objects"] == {"board": "object"}
    assert "learnt with other localiser" in done.stdout
