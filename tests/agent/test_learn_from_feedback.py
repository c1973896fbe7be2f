"""`flawline learn --from-feedback` on a real journal and archive, with the shipped bundle."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from flawline.agent.archive import Archive
from flawline.agent.cli import cli
from flawline.agent.journal import Journal
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.settings import JournalSettings
from flawline.config.sources import load_settings

Picture = Any  # (H, W, 3) uint8 RGB
EDGE = 192

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def plate(number: int) -> Picture:
    """A grey plate with four holes, its grain its own."""
    rng = np.random.default_rng(number)
    picture = np.full((EDGE, EDGE, 3), (60.0, 60.0, 66.0))
    picture[24:168, 24:168] = (150, 152, 156)
    for y in (48, 144):
        for x in (48, 144):
            cv2.circle(picture, (x, y), 8, (40, 40, 44), -1)
    picture += cv2.GaussianBlur(rng.normal(0, 12, (EDGE, EDGE)), (0, 0), 1.5)[..., None]
    return picture.clip(0, 255).astype(np.uint8)


def labelled(number: int) -> Picture:
    """A good plate that carries a label, as the learnt ones do not."""
    picture = plate(number)
    picture[80:112, 84:124] = (235, 235, 230)
    picture[88:92, 88:120] = picture[98:102, 88:112] = (30, 60, 160)
    return picture


def scratched(number: int) -> Picture:
    picture = plate(number)
    x, y = np.random.default_rng(number).integers(40, 60, 2).tolist()
    cv2.line(picture, (x, y), (x + 60, y + 40), (20, 18, 16), 4)
    return picture


class Line:
    """A station's files: configuration, journal and archive, written by the parts of the agent that write them."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.file = folder / "line.toml"
        self.file.write_text(
            'station = "press"\n[journal]\npath = "state"\n'
            f'[model]\ndevice = "cpu"\n[recipes.default]\n[recipes.plates]\nobject = "metal plate"\n{more}'
        )
        self.station = load_settings(self.file, environ={}).journal.path / "press"
        self.settings = JournalSettings(archive_good_every=1, archive_format="png")

    def learn(self, *options: str, kind: str = "json") -> Any:
        """What the command prints. Raises what it raises."""
        command = ["learn", "--config", str(self.file), "--recipe", "plates", *options]
        done = CliRunner().invoke(cli, command + ["--json"] * (kind == "json"), standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout) if kind == "json" else done.stdout

    def write(
        self, verdicts: list[tuple[str, Picture]], marks: list[tuple[int, str, str, str]], recipe: str = "plates"
    ) -> None:
        """Verdicts with their pictures (a result of `error` has none), then the operators' words."""
        journal = Journal(self.station)
        archive = Archive(self.station / "pictures", self.settings)
        for result, picture in verdicts:
            header = {"camera": "top", "t_publish": 1, "result": result, "recipe": {"id": recipe, "version": 1}}
            journal.number(header)
            journal.commit([(header, None)])
            if archive.wants(header):
                archive.keep(header, picture)
                archive.waiting -= 1
        for seq, label, who, note in marks:
            journal.feedback(seq, label, who, note)
        journal.close()

    @property
    def memory(self) -> str | None:
        recipe: dict[str, Any] = tomllib.loads(self.file.read_text())["recipes"]["plates"]
        return recipe.get("memory")


Make = Callable[..., Line]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for number in range(5):
        Image.fromarray(plate(number)).save(folder / f"{number}.png")
    return folder


def test_a_wrong_reject_is_learnt_shown_activated_and_taken_back(tmp_path: Path, good: Path) -> None:
    line = Line(tmp_path)
    first = line.learn("--good", str(good))["memory_sha256"]
    before = line.memory
    line.write(
        [
            ("fail", labelled(20)),
            ("fail", scratched(21)),
            ("fail", labelled(22)),
            ("pass", plate(23)),
            ("fail", scratched(24)),
        ],
        [
            (1, "good", "anna", "only the label"),
            (2, "bad", "bert", ""),
            (5, "good", "eve", ""),
            (5, "bad", "eve", "no"),
        ],
    )
    shown = line.learn("--from-feedback")
    assert [(one["seq"], one["who"], one["use"]) for one in shown["marked"]] == [(1, "anna", "learnt")]
    assert line.memory == before
    assert shown["memory_before_sha256"] == first != shown["memory_sha256"]
    outcome = {one["seq"]: (one["group"], one["passed_before"], one["passed_after"]) for one in shown["judged"]}
    assert outcome == {
        1: ("wrong_rejects", False, True),
        2: ("confirmed_defects", False, False),
        3: ("other_rejects", False, True),  # another part with such a label: seen only after the learning
        4: ("good_parts", True, True),
        5: ("confirmed_defects", False, False),  # the later word counts
    }
    assert shown["defects_that_would_pass"] == []
    assert not shown["activated"]

    said = line.learn("--from-feedback", "--activate", kind="text")
    assert "verdict 1, camera top, marked by anna" in said
    assert "(only the label): learnt" in said
    assert line.memory == f"memory/plates.0002.{shown['memory_sha256'][:12]}.safetensors"
    assert "nothing new to learn" in line.learn("--from-feedback", kind="text")
    inspected = CliRunner().invoke(
        cli,
        ["inspect", str(line.station / "pictures"), "--config", str(line.file), "--recipe", "plates", "--json"],
        standalone_mode=False,
    )
    records = [json.loads(text) for text in inspected.stdout.splitlines()]
    assert [record["result"] for record in records] == ["pass", "fail", "pass", "pass", "fail"]
    assert {record["provenance"]["memory_sha256"] for record in records} == {shown["memory_sha256"]}
    assert f"{first[:12]}" in line.learn("--rollback", kind="text")
    assert line.memory == before


def test_a_confirmed_defect_that_would_pass_stops_the_activation(tmp_path: Path, good: Path) -> None:
    line = Line(tmp_path)
    line.learn("--good", str(good))
    before = line.memory
    line.write([("fail", labelled(20)), ("fail", labelled(30))], [(1, "OK", "anna", ""), (2, "defect", "bert", "")])
    with pytest.raises(FlawlineError, match=r"confirmed as defective: verdict 2; not activated \(--force"):
        line.learn("--from-feedback", "--activate")
    assert line.memory == before
    said = line.learn("--from-feedback", kind="text")
    assert "DEFECTS that would pass: 1\n  verdict 2, camera top: score" in said
    assert "--activate will refuse it" in said
    forced = line.learn("--from-feedback", "--activate", "--force")
    assert forced["activated"]
    assert forced["defects_that_would_pass"] == [2]
    assert line.memory is not None
    assert "plates.0002" in line.memory


def test_a_picture_that_is_gone_is_named_with_its_verdict(tmp_path: Path, good: Path) -> None:
    line = Line(tmp_path)
    line.learn("--good", str(good))
    line.write([("fail", labelled(20)), ("fail", labelled(21))], [(1, "good", "anna", ""), (2, "good", "anna", "")])
    (gone,) = (line.station / "pictures").glob("*/*0001-fail.png")
    gone.unlink()
    shown = line.learn("--from-feedback", "--compare", "0")
    assert [(one["seq"], one["use"]) for one in shown["marked"]] == [(1, "gone"), (2, "learnt")]
    assert "is not kept" in shown["marked"][0]["reason"]
    assert [one["seq"] for one in shown["judged"]] == [2]
    for left in (line.station / "pictures").glob("*/*"):
        left.unlink()
    with pytest.raises(FlawlineError, match=r"pictures: of no reject that is marked as wrong \(1, 2\) the picture"):
        line.learn("--from-feedback")


def test_what_is_missing_is_said_before_any_model_is_loaded(tmp_path: Path) -> None:
    line = Line(tmp_path)
    with pytest.raises(ConfigError, match=r"press/journal\.sqlite: there is no journal"):
        line.learn("--from-feedback")
    line.write([("fail", plate(1)), ("pass", plate(2))], [(1, "bad", "bert", ""), (2, "good", "bert", "")])
    line.write([("fail", plate(3))], [(3, "good", "bert", "")], recipe="default")
    with pytest.raises(ConfigError, match=r"no reject of recipe 'plates' is marked as wrong .* 2 marks"):
        line.learn("--from-feedback")
    with pytest.raises(ConfigError, match="--from-feedback: takes its pictures from the archive"):
        line.learn("--from-feedback", "--good", str(tmp_path))
    with pytest.raises(ConfigError, match="--activate, --force: belong to --from-feedback"):
        line.learn("--good", str(tmp_path), "--activate")


def test_a_memory_of_another_bundle_is_refused(tmp_path: Path, good: Path) -> None:
    from tiny_bundle import write_tiny_bundle

    line = Line(tmp_path)
    line.learn("--good", str(good))
    line.write([("fail", labelled(20))], [(1, "good", "anna", "")])
    bundle = write_tiny_bundle(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="was learnt with bundle 'demo'"):
        line.learn("--from-feedback", "--bundle", str(bundle))
