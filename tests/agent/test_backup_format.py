"""Backups that somebody changed: refused before the first file is written, and never more than files of a station."""

import hashlib
import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from flawline.agent.restore import restore
from flawline.config.errors import ConfigError

CONTENT = b"[recipes.default]\n"


def entry(path: str, member: str = "00000/line1.toml", **more: Any) -> dict[str, Any]:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return {"member": member, "path": path, "sha256": digest, "mode": 0o640, "owner": "root", "group": "root"} | more


def forge(file: Path, *entries: Any, **more: Any) -> Path:
    """A backup of these entries, each with the same content."""
    head = {"schema": "flawline.backup/1", "created": time.time(), "config": "/etc/flawline/line1.toml"}
    manifest = head | {"state": "/var/lib/flawline/line1", "files": entries} | more
    with tarfile.open(file, "w:gz") as tar:
        members = [item["member"] for item in entries if isinstance(item, dict) and isinstance(item["member"], str)]
        for name, content in [("manifest.json", json.dumps(manifest).encode()), *((name, CONTENT) for name in members)]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


GOOD = entry("/etc/flawline/line1.toml")


def test_a_file_of_a_station_is_no_program_and_not_everybodys_to_write(tmp_path: Path) -> None:
    file = forge(tmp_path / "backup", GOOD | {"mode": 0o6777}, entry("/etc/flawline/line1.env", "00001/x", mode=0o600))
    done = restore(file, tmp_path / "root", force=False, skip_numbers=0)
    assert [path.stat().st_mode & 0o7777 for path in done.written] == [0o664, 0o600]
    assert [path.read_bytes() for path in done.written] == [CONTENT, CONTENT]


@pytest.mark.parametrize("path", ["/etc/cron.d/flawline", "/var/lib/flawline/line2/x", "/etc/flawline2/line1.toml"])
def test_what_lies_elsewhere_is_restored_only_when_that_is_said(tmp_path: Path, path: str) -> None:
    file, root = forge(tmp_path / "backup", GOOD, entry(path, "00001/x")), tmp_path / "root"
    with pytest.raises(ConfigError, match=f"^{path}: lies outside .* --everywhere"):
        restore(file, root, force=False, skip_numbers=0)
    assert not root.exists()
    restore(file, root, force=False, skip_numbers=0, everywhere=True)
    assert (root / path[1:]).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "wrong",
    [
        entry("/etc/flawline/a", "00001/x", mode="0640"),
        entry("/etc/flawline/a", "00001/x", mode=None),
        entry("/etc/flawline/a", "00001/x", mode=True),
        entry("/etc/flawline/a", "00001/x", owner=["root"]),
        entry("/etc/flawline/a", "00001/x", sha256=7),
        entry("/etc/flawline/a", "00001/x", sha256="00"),
        entry("/etc/flawline/a", "../../x"),
        entry("/etc/flawline/a", "00001"),
        entry("/etc/flawline/../cron.d/a", "00001/x"),
        entry("etc/flawline/a", "00001/x"),
        entry("/etc/flawline/a\0b", "00001/x"),
        entry("/etc/flawline/line1.toml", "00001/x"),
        entry("/etc/flawline/line1.toml/a", "00001/x"),
        entry("/etc/flawline/a", "00000/line1.toml"),
        "no table",
    ],
)
def test_every_entry_is_checked_before_the_first_is_written(tmp_path: Path, wrong: Any) -> None:
    file = forge(tmp_path / "backup", GOOD, wrong)
    with pytest.raises(ConfigError, match=f"^{file}: "):
        restore(file, tmp_path / "root", force=False, skip_numbers=0, everywhere=True)
    assert {path.name for path in tmp_path.iterdir()} == {"backup"}


@pytest.mark.parametrize(
    "more",
    [
        {"created": "today"},
        {"created": float("inf")},
        {"created": -1e30},
        {"created": 10**400},
        {"state": "state"},
        {"state": "/"},
        {"config": None},
        {"files": None},
        {"files": {}},
        {"schema": "flawline.backup/2"},
    ],
)
def test_so_is_its_head(tmp_path: Path, more: dict[str, Any]) -> None:
    file = forge(tmp_path / "backup", GOOD, **more)
    with pytest.raises(ConfigError, match=f"^{file}: "):
        restore(file, tmp_path / "root", force=False, skip_numbers=None)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b"7"])
def test_a_head_that_is_no_table_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "backup"
    with tarfile.open(file, "w:gz") as tar:
        info = tarfile.TarInfo("manifest.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ConfigError, match=f"^{file}: "):
        restore(file, tmp_path / "root", force=False, skip_numbers=None)


def test_a_folder_in_a_files_place_is_found_before_anything_is_written(tmp_path: Path) -> None:
    file, root = forge(tmp_path / "backup", GOOD, entry("/etc/flawline/a", "00001/x")), tmp_path / "root"
    (root / "etc/flawline/a").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"flawline/a: is a folder"):
        restore(file, root, force=True, skip_numbers=0)
    assert not (root / "etc/flawline/line1.toml").exists()


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = forge(tmp_path / "backup", GOOD)
    monkeypatch.setattr("flawline.agent.restore._ROOM_LEFT", 1 << 60)  # a disk that is nearly full
    with pytest.raises(ConfigError, match=f"^{tmp_path}: has no room for /etc/flawline/line1.toml"):
        restore(file, tmp_path / "root", force=False, skip_numbers=0)
    monkeypatch.setattr("flawline.agent.backup_format.MOST_MANIFEST_BYTES", 100)
    with pytest.raises(ConfigError, match="manifest has"):
        restore(file, tmp_path / "root", force=False, skip_numbers=0)
