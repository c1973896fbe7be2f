"""A station's backup and its way back: verdicts, numbers, recipes, keys; and what is refused."""

import grp
import os
import pwd
import resource
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from station import Make

from flawline.agent.backup import back_up
from flawline.agent.journal import Journal
from flawline.agent.restore import restore
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


def test_what_is_cleared_away_meanwhile_is_passed_over(tmp_path: Path) -> None:
    config = tmp_path / "line.toml"
    config.write_text('[journal]\npath = "state"\n')
    pictures = [tmp_path / f"state/line1/pictures/top/{number}-fail.jpg" for number in range(3)]
    pictures[0].parent.mkdir(parents=True)
    for picture in pictures:
        picture.write_text(picture.name)
    file = tmp_path / "there/backup"
    file.parent.mkdir()
    with closing(sqlite3.connect(tmp_path / "state/line1/journal.sqlite")) as journal, ThreadPoolExecutor(1) as pool:
        journal.execute("BEGIN EXCLUSIVE")  # the backup waits for it, when it has looked for the files
        written = pool.submit(back_up, config, load_settings(config, environ={}), file, pictures=True)
        end = time.monotonic() + 30
        while not any(file.parent.iterdir()) and time.monotonic() < end:
            time.sleep(0.001)
        pictures[0].unlink()  # as housekeeping does
        journal.rollback()
        names = written.result(60)
    assert [name for name in names if name.endswith(".jpg")] == [str(picture) for picture in pictures[1:]]
    assert list(file.parent.iterdir()) == [file]
    restore(file, tmp_path / "root", force=False, skip_numbers=None)
    for picture in pictures[1:]:
        assert (tmp_path / "root" / picture.relative_to("/")).read_text() == picture.name


def test_the_disks_of_backup_and_state_are_used_and_named_not_that_of_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "line.toml"
    config.write_text("# " + "long " * 100_000)
    file, root = tmp_path / "backup", tmp_path / "root"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    back_up(config, load_settings(config, environ={}), file, pictures=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # in the place of a full disk
    try:
        with pytest.raises(ConfigError, match=f"^{tmp_path}: the backup cannot be unpacked there: File too large"):
            restore(file, root, force=False, skip_numbers=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "line.toml"]
    restore(file, root, force=False, skip_numbers=None)
    assert (root / config.relative_to("/")).read_text() == config.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owner_and_group_come_back_by_name_and_those_of_an_overwritten_file_stay(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    config = tmp_path / "line.toml"
    config.write_text('[journal]\npath = "state"\n')
    os.chown(config, 0, nobody.pw_gid)  # as root:flawline, for a camera's password
    config.chmod(0o640)
    file = tmp_path / "backup"
    back_up(config, load_settings(config, environ={}), file, pictures=False)
    with tarfile.open(file) as tar:
        assert tar.getmembers()[1].gname == grp.getgrgid(nobody.pw_gid).gr_name
    config.unlink()
    restore(file, Path("/"), force=False, skip_numbers=None)
    status = config.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, nobody.pw_gid, 0o640)
    os.chown(config, nobody.pw_uid, 0)
    restore(file, Path("/"), force=True, skip_numbers=None)
    assert (config.stat().st_uid, config.stat().st_gid) == (nobody.pw_uid, 0)
