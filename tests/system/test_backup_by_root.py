"""Backup and its way back by root, in folders of the service's user who may have laid links there."""

import contextlib
import os
import pwd
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flawline.agent.backup import back_up
from flawline.agent.journal import Journal
from flawline.agent.restore import restore
from flawline.config.errors import ConfigError
from flawline.config.sources import load_settings

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to lose to another user")


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A folder of an unprivileged user, as the state is, in root's; with an empty station in it."""
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # the other user goes through it
        (Path(name) / "line.toml").write_text('[journal]\npath = "state"\n')
        Journal(Path(name, "state/line1")).close()
        for path in (Path(name, "state"), *Path(name, "state").rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        (Path(name) / "secret").write_text("root's alone")
        (Path(name) / "secret").chmod(0o600)
        yield Path(name)


def packed(folder: Path, warn: list[str] | None = None) -> list[str]:
    config = folder / "line.toml"
    said = [] if warn is None else warn
    return back_up(config, load_settings(config, environ={}), folder / "backup", pictures=False, warn=said.append)


def test_links_that_the_services_user_laid_are_not_packed(theirs: Path) -> None:
    state = theirs / "state/line1"
    (state / "notes").write_text("mine")
    (state / "planted").symlink_to(theirs / "secret")
    (state / "folder").symlink_to(theirs)
    os.mkfifo(state / "pipe")
    os.link(theirs / "secret", state / "second")  # where the kernel lets it
    memory = theirs / "state/memory" / f"plates.0001.{'ab' * 6}.safetensors"
    memory.parent.mkdir()
    os.chown(memory.parent, 65534, 65534)
    memory.symlink_to(theirs / "secret")
    said: list[str] = []
    inside = packed(theirs, said)
    assert str(state / "notes") in inside
    left_out = (memory, state / "folder", state / "pipe", state / "planted", state / "second")
    assert sorted(line.split(":")[0] for line in said) == [str(path) for path in sorted(left_out)]
    assert not {str(path) for path in left_out} & {*inside}
    with tarfile.open(theirs / "backup") as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            assert b"root's alone" not in stream.read()


@pytest.mark.parametrize("name", ["journal.sqlite", "seq.mark", ""])
def test_a_state_that_leads_elsewhere_is_not_packed(theirs: Path, name: str) -> None:
    state = theirs / "state/line1" / name
    state.rename(theirs / "moved")
    state.symlink_to(theirs / "moved")
    with pytest.raises(ConfigError, match="link"):
        packed(theirs)
    assert not (theirs / "backup").exists()


def test_a_link_that_root_laid_is_followed(theirs: Path) -> None:
    (theirs / "state").rename(theirs / "elsewhere")
    (theirs / "state").symlink_to("elsewhere")
    (theirs / "line.toml").rename(theirs / "real.toml")
    (theirs / "line.toml").symlink_to(theirs / "real.toml")
    inside = packed(theirs)
    assert {str(theirs / "line.toml"), str(theirs / "state/line1/journal.sqlite")} <= {*inside}
    restore(theirs / "backup", Path("/"), force=True, skip_numbers=9)
    assert (theirs / "elsewhere/line1/journal.sqlite").stat().st_uid == pwd.getpwnam("nobody").pw_uid


@pytest.mark.parametrize(
    "name", [".journal.sqlite.partial", "journal.sqlite", "seq.mark", "lock", "journal.sqlite-wal"]
)
def test_links_that_the_services_user_laid_are_not_written_through(
    theirs: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr("flawline.agent.restore._owner", lambda prefix: (nobody.pw_uid, nobody.pw_gid))
    packed(theirs)
    before = (theirs / "secret").stat()
    (theirs / "state/line1" / name).unlink(missing_ok=True)
    (theirs / "state/line1" / name).symlink_to(theirs / "secret")
    with contextlib.suppress(ConfigError):
        restore(theirs / "backup", Path("/"), force=True, skip_numbers=9)
    after = (theirs / "secret").stat()
    assert (theirs / "secret").read_text() == "root's alone"
    assert (after.st_uid, after.st_mode, after.st_ino) == (before.st_uid, before.st_mode, before.st_ino)


@pytest.mark.parametrize("folder", ["state/line1", "state/line1/inner"])
def test_nothing_is_restored_into_a_folder_that_leads_elsewhere(theirs: Path, folder: str) -> None:
    (theirs / "state/line1/inner").mkdir()
    (theirs / "state/line1/inner/notes").write_text("mine")
    packed(theirs)
    (theirs / folder).rename(theirs / "moved")
    (theirs / "victim").mkdir()
    (theirs / folder).symlink_to(theirs / "victim")
    with pytest.raises(ConfigError, match=r"'(line1|inner)' is a link"):
        restore(theirs / "backup", Path("/"), force=True, skip_numbers=9)
    assert not any((theirs / "victim").iterdir())


def test_the_state_is_the_services_users_when_it_is_back(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr("flawline.agent.restore._owner", lambda prefix: (nobody.pw_uid, nobody.pw_gid))
    (theirs / "state/line1/inner").mkdir()
    (theirs / "state/line1/inner/notes").write_text("root's once")
    packed(theirs)
    shutil.rmtree(theirs / "state")
    (theirs / "line.toml").unlink()
    restore(theirs / "backup", Path("/"), force=False, skip_numbers=9)
    for path in (theirs / "state/line1", *(theirs / "state/line1").rglob("*")):
        assert (path.stat().st_uid, path.stat().st_gid) == (nobody.pw_uid, nobody.pw_gid), path
    assert (theirs / "line.toml").stat().st_uid == 0
    assert (theirs / "state/line1/seq.mark").is_file()
    assert {path.name for path in theirs.iterdir()} == {"backup", "line.toml", "secret", "state"}
