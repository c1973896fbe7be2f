"""A station's backup and its way back: verdicts, numbers, recipes, keys; and what is refused."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from station import Make

from flawline.agent.backup import back_up, restore
from flawline.agent.journal import Journal
from flawline.agent.security import make_keys
from flawline.config.errors import ConfigError
from flawline.config.sources import load_settings

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]


def flawline(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_station_comes_back_whole_and_gives_no_number_twice(make_station: Make, tmp_path: Path) -> None:
    station = make_station({"top": [("good", 0), ("bad", 0)]}, "[recipes.default]\n[recipes.other]\nthreshold = 0.7\n")
    secret, _ = make_keys(station.folder / "keys" / "line", "curve")  # where the unit takes credentials from
    station.start()
    station.trigger("top", "A", "B")
    station.until("verdict", 2)
    station.ask("recipe.activate", recipe="other")
    file = tmp_path / "line.backup"
    code, said = flawline("backup", str(file), "--config", str(station.config))  # while it runs
    assert code == 0, said
    assert os.stat(file).st_mode & 0o777 == 0o600
    station.trigger("top", "C")
    assert station.until("verdict", 3)[2]["seq"] == 3
    # Not under a running agent, and not over files without being told to.
    assert "an agent is running" in flawline("restore", str(file), "--force")[1]
    station.stop()
    code, said = flawline("restore", str(file))
    assert code == 2
    assert "--force" in said
    config, key = station.config.read_text(), secret.read_bytes()
    station.config.unlink()
    secret.unlink()
    code, said = flawline("restore", str(file), "--force")
    assert code == 0, said
    assert (station.config.read_text(), secret.read_bytes()) == (config, key)
    assert secret.stat().st_mode & 0o777 == 0o600
    station.start()
    assert station.status()["recipe"]["top"] == {"id": "other", "version": 1}
    verdicts = station.ask("replay", from_seq=1)["verdicts"]
    assert [verdict["trigger_id"] for verdict in verdicts] == ["A", "B"]
    jump = station.status()["seq_jump"]
    assert jump[0] == 2
    assert jump[1] > 3  # number 3 went out after the backup and is not given again
    station.trigger("top", "D")
    verdict = station.until("verdict", 4)[3]
    assert verdict["seq"] == verdict["camera_seq"] == jump[1]
    station.stop()


@pytest.mark.parametrize("durability", ["process", "power"])
def test_numbers_skip_what_may_have_been_used(tmp_path: Path, durability: str) -> None:
    """On a new machine nothing is known but the time that has passed, or what the engineer says."""
    config = tmp_path / "old/line.toml"
    config.parent.mkdir()
    config.write_text('[journal]\npath = "state"\n')
    journal = Journal(tmp_path / "old/state/line1")
    headers = [{"camera": "top", "t_publish": 1, "result": "pass", "number": number} for number in range(5)]
    for header in headers:
        journal.number(header)
    journal.commit([(header, None) for header in headers])
    journal.close()
    file = tmp_path / "backup"
    back_up(config, load_settings(config, environ={}), file, pictures=False)
    for skip, name in ((50_000, "new"), (0, "moved")):
        restore(file, tmp_path / name, force=False, skip_numbers=skip)
    state = Path(*tmp_path.parts[1:]) / "old/state/line1"
    again = Journal(tmp_path / "new" / state, durability)  # type: ignore[arg-type]
    assert again.seq_jump is not None
    assert again.seq_jump[0] == 5
    assert again.last_seq >= 50_000
    assert again.camera_seqs == {"top": again.last_seq}
    again.close()
    moved = Journal(tmp_path / "moved" / state, durability)  # type: ignore[arg-type]
    assert (moved.seq_jump, moved.last_seq, moved.camera_seqs) == (None, 5, {"top": 5})
    moved.close()


def test_what_is_no_backup_or_damaged_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = tmp_path / "line.toml"
    config.write_text("# whole\n")
    file, root = tmp_path / "backup", tmp_path / "root"
    back_up(config, load_settings(config, environ={}), file, pictures=False)
    whole = file.read_bytes()
    wrong = {"nothing": b"", "noise": os.urandom(300), "half": whole[: len(whole) // 2]}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "foreign", "w:gz") as tar:
        tar.add(config, "line.toml")
    for name in (*wrong, "foreign", "missing"):
        with pytest.raises(ConfigError, match=name):
            restore(tmp_path / name, root, force=False, skip_numbers=None)
    assert not root.exists()
    restore(file, root, force=False, skip_numbers=None)
    assert (root / config.relative_to("/")).read_text() == "# whole\n"


def test_what_was_learnt_is_kept_with_every_version_to_roll_back_to(tmp_path: Path) -> None:
    config = tmp_path / "line.toml"
    names = [f"plates.000{number}.{'ab' * 6}.safetensors" for number in (1, 2)]
    config.write_text(f'[journal]\npath = "state"\n[recipes.default]\n[recipes.plates]\nmemory = "memory/{names[1]}"\n')
    kept = [tmp_path / "memory" / name for name in names]  # by `flawline learn`
    kept += [tmp_path / "state/memory" / name for name in names]  # on the running line
    kept += [tmp_path / "memory/line.plates.history"]
    for path in (*kept, tmp_path / "memory/notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))
    Journal(tmp_path / "state/line1").close()
    file, root = tmp_path / "backup", tmp_path / "root"
    assert {str(path) for path in kept} < set(back_up(config, load_settings(config, environ={}), file, pictures=False))
    restore(file, root, force=False, skip_numbers=None)
    for path in kept:
        assert (root / path.relative_to("/")).read_text() == str(path)
    assert not (root / tmp_path.relative_to("/") / "memory/notes.txt").exists()
