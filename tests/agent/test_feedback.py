"""What is read from a station's journal of operators' words and of the recipe that judges, beside a running agent."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flawline.agent.cli_teach import finish
from flawline.agent.feedback import reading
from flawline.agent.journal import Journal
from flawline.agent.recipes import RecipeBook
from flawline.agent.teaching import Report
from flawline.config.errors import ConfigError
from flawline.config.memory_versions import pending_file
from flawline.config.settings import Settings
from flawline.config.sources import load_settings


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "line1")
    yield journal
    journal.close()


def write(journal: Journal, *results: str, late: tuple[int, str] | None = None) -> None:
    headers = [
        {"camera": "top", "t_publish": 1, "result": result, "recipe": {"id": "plates", "version": 1}}
        for result in results
    ]
    for header in headers:
        journal.number(header)
    changed = [] if late is None else [headers[late[0] - 1] | {"result": late[1]}]
    journal.commit([(header, None) for header in headers], late=changed)


def test_the_last_word_on_a_verdict_counts(journal: Journal) -> None:
    write(journal, "fail", "fail", "fail", "pass", "error", "fail", late=(5, "fail"))
    for seq, label in (
        (1, "Good"),
        (2, "bad"),
        (2, "false reject"),
        (3, "good"),
        (3, "look again"),
        (4, "good"),
        (5, "ok"),
    ):
        journal.feedback(seq, label, "anna", f"of {seq}")
    journal.feedback(6, "NOK", "bert", "")
    with reading(journal.folder) as record:
        marks = record.marks()
    assert [(mark.seq, mark.good, mark.wrong_reject) for mark in marks] == [
        (1, True, True),
        (2, True, True),
        (4, True, False),  # good, and it passed
        (5, True, True),  # its late result was a reject
        (6, False, False),
    ]
    assert (marks[0].who, marks[0].note, marks[0].camera, marks[0].recipe) == ("anna", "of 1", "top", "plates")
    assert marks[0].t > 1_500_000_000_000_000_000


def test_a_recipe_that_was_activated_by_command_is_the_one_that_judges(journal: Journal) -> None:
    settings = Settings.model_validate(
        {"recipes": {"default": {"object": "plate"}}, "journal": {"path": journal.folder}}
    )
    configured = settings.recipes["default"]
    book = RecipeBook(settings, journal)
    with reading(journal.folder) as record:
        assert record.judging("default", settings.recipes) == (configured, None)
    changed = book.version_of("default", configured.model_copy(update={"threshold": 0.9}))
    book.activate(["sim"], changed)
    book.keep([changed], ["sim"])
    with reading(journal.folder) as record:
        assert record.judging("default", settings.recipes) == (changed.recipe, 2)
        # the file says something new for that camera: the activation gives way
        newer = {"default": configured.model_copy(update={"object": "cover"})}
        assert record.judging("default", newer) == (newer["default"], None)


def test_a_folder_without_a_journal_and_one_of_another_flawline_are_refused(tmp_path: Path, journal: Journal) -> None:
    with pytest.raises(ConfigError, match="there is no journal here"), reading(tmp_path / "line2"):
        pass
    journal.query("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match=r"journal\.sqlite: was written by another flawline"), reading(journal.folder):
        pass


def test_the_command_line_itself_loads_no_torch() -> None:
    code = "import sys, flawline.agent.cli, flawline.agent.teaching; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=240, check=False).returncode == 0


def test_at_a_terminal_it_is_asked_and_only_a_yes_activates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "line.toml"
    for said, activated in (("n", False), ("y", True)):
        file.write_text('[recipes.default]\nobject = "plate"  # words\n')
        pending = pending_file(tmp_path / "memory", "default", "a1" * 32)
        pending.parent.mkdir(exist_ok=True)
        pending.write_bytes(b"a memory")
        recipe = load_settings(file, environ={}).recipes["default"]
        report = Report(recipe, None, [], pending, "a1" * 32, None, 3, [], [], [])
        ours, theirs = os.openpty()
        with os.fdopen(ours, "wb", buffering=0) as keyboard, os.fdopen(theirs, "r") as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            keyboard.write(f"{said}\n".encode())
            finish(report, "default", recipe, file, go=False, force=False, as_json=False)
        version = "memory/default.0001.a1a1a1a1a1a1.safetensors"
        assert (load_settings(file, environ={}).recipes["default"].memory is not None) == activated
        assert (tmp_path / version).is_file() == activated
        assert pending.exists() != activated
    assert file.read_text() == f'[recipes.default]\nobject = "plate"  # words\nmemory = "{version}"\n'
