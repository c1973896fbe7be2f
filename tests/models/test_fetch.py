"""Downloads against a real server on this machine: slow, cut, corrupt, wrong in length, without ranges, gone."""

import asyncio
import hashlib
import json
import random
import socket
import time
from pathlib import Path

import aiohttp
import pytest
from file_server import Behaviour, serving

from flawline.config.errors import BundleError, FetchError
from flawline.models import fetch
from flawline.models.fetch import Patience, download, require_space, take_from
from flawline.models.known_bundles import PublishedFile

DATA = random.Random(0).randbytes(300_000)
HURRIED = Patience(connect_s=5.0, silence_s=20.0, tries=3, pause_s=0.01)


def published(address: str, data: bytes = DATA) -> PublishedFile:
    return PublishedFile("w.pt", f"{address}/w.pt", hashlib.sha256(data).hexdigest(), len(data), "MIT")


def get(file: PublishedFile, target: Path, patience: Patience = HURRIED) -> list[int]:
    """Download; the numbers of bytes that were reported."""
    seen: list[int] = []

    async def go() -> None:
        async with aiohttp.ClientSession() as session:
            await download(session, file, target, lambda name, here, total: seen.append(here), patience)

    asyncio.run(go())
    return seen


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_slow_answer_arrives_whole_and_reports_its_progress(tmp_path: Path) -> None:
    with serving(Behaviour({"w.pt": DATA}, chunk=30_000, pause_s=0.05)) as address:
        seen = get(published(address), tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == DATA
    assert leftovers(tmp_path) == ["w.pt"]
    assert seen == sorted(seen)
    assert seen[-1] == len(DATA)
    assert len(seen) > 3


def test_a_cut_answer_is_gone_on_with_where_it_ended(tmp_path: Path) -> None:
    behaviour = Behaviour({"w.pt": DATA}, cuts=[100_000, 50_000])
    with serving(behaviour) as address:
        get(published(address), tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == DATA
    assert behaviour.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert behaviour.sent == len(DATA)


def test_another_process_goes_on_with_what_an_interrupted_one_left(tmp_path: Path) -> None:
    behaviour = Behaviour({"w.pt": DATA}, cuts=[100_000, 0, 0, 0])
    with serving(behaviour) as address:
        with pytest.raises(FetchError, match=r"w\.pt: http.*100000 of 300000 bytes are here"):
            get(published(address), tmp_path / "w.pt")
        assert not (tmp_path / "w.pt").exists()
        assert (tmp_path / "w.pt.part").stat().st_size == 100_000
        behaviour.cuts.clear()
        get(published(address), tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == DATA
    assert behaviour.sent == len(DATA)


def test_a_part_of_another_version_is_not_gone_on_with(tmp_path: Path) -> None:
    old = Behaviour({"w.pt": bytes(len(DATA))}, cuts=[100_000, 0, 0, 0], etag='"old"')
    with serving(old) as address:
        with pytest.raises(BundleError):
            get(published(address), tmp_path / "w.pt")
        old.files["w.pt"], old.etag, old.cuts = DATA, '"new"', []
        get(published(address), tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == DATA
    assert old.sent == 100_000 + len(DATA)


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_server_without_ranges_is_asked_for_the_whole_again(tmp_path: Path, etag: str | None) -> None:
    behaviour = Behaviour({"w.pt": DATA}, cuts=[100_000], ranges=False, etag=etag)
    with serving(behaviour) as address:
        get(published(address), tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == DATA
    assert behaviour.sent == 100_000 + len(DATA)


def test_a_server_that_always_cuts_and_has_no_ranges_is_given_up(tmp_path: Path) -> None:
    behaviour = Behaviour({"w.pt": DATA}, cuts=[100_000] * 50, ranges=False)
    with serving(behaviour) as address, pytest.raises(BundleError, match=r"w\.pt: http.*bytes are here"):
        get(published(address), tmp_path / "w.pt")
    assert len(behaviour.asked) <= 5


def test_a_corrupt_answer_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    corrupt = bytearray(DATA)
    corrupt[1234] ^= 1
    said = r"w\.pt: what came from http://\S+/w\.pt has checksum"
    with serving(Behaviour({"w.pt": bytes(corrupt)})) as address, pytest.raises(BundleError, match=said):
        get(published(address), tmp_path / "w.pt")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("served", [DATA[:-1], DATA + b"x"])
@pytest.mark.parametrize("say_length", [True, False])
def test_another_length_is_refused(tmp_path: Path, served: bytes, say_length: bool) -> None:
    behaviour = Behaviour({"w.pt": served}, say_length=say_length)
    with serving(behaviour) as address, pytest.raises(BundleError, match=r"w\.pt: .*\b300000\b"):
        get(published(address), tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()
    if say_length:
        assert behaviour.sent < len(DATA) or len(behaviour.asked) == 1
        assert leftovers(tmp_path) == []


def test_a_busy_server_is_tried_again_and_a_missing_file_is_not(tmp_path: Path) -> None:
    busy = Behaviour({"w.pt": DATA}, fail_first=[503, 429])
    with serving(busy) as address:
        get(published(address), tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == DATA
    gone = Behaviour({})
    with serving(gone) as address, pytest.raises(BundleError, match=r"w\.pt: http.*404"):
        get(published(address), tmp_path / "other.pt")
    assert len(gone.asked) == 1


def test_silence_has_a_limit(tmp_path: Path) -> None:
    behaviour = Behaviour({"w.pt": DATA}, silent=True)
    began = time.monotonic()
    with serving(behaviour) as address, pytest.raises(BundleError, match="no answer in time"):
        get(published(address), tmp_path / "w.pt", Patience(5.0, 0.3, 2, 0.01))
    assert time.monotonic() - began < 25.0
    assert len(behaviour.asked) == 2


def test_no_network_is_said(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(FetchError, match=r"w\.pt: http.*0 of 300000 bytes are here"):
        get(published(address), tmp_path / "w.pt")


def test_a_note_that_is_not_ours_starts_over(tmp_path: Path) -> None:
    (tmp_path / "w.pt.part").write_bytes(b"x" * 1000)
    (tmp_path / "w.pt.part.json").write_text(json.dumps(["no", "note"]))
    with serving(Behaviour({"w.pt": DATA})) as address:
        get(published(address), tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == DATA


def test_a_folder_serves_offline_and_is_checked(tmp_path: Path) -> None:
    folder, target = tmp_path / "usb", tmp_path / "w.pt"
    folder.mkdir()
    file = published("http://127.0.0.1:1")
    with pytest.raises(BundleError, match=r"usb/w\.pt: not found"):
        take_from(folder, file, target, lambda *_: None)
    (folder / "w.pt").write_bytes(DATA[:-1] + b"x")
    with pytest.raises(BundleError, match=r"usb/w\.pt: has checksum"):
        take_from(folder, file, target, lambda *_: None)
    assert not target.exists()
    (folder / "w.pt").write_bytes(DATA)
    take_from(folder, file, target, lambda *_: None)
    assert target.read_bytes() == DATA


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_space(tmp_path, 1000)
    with pytest.raises(BundleError, match=r"GB are free on this disk"):
        require_space(tmp_path, 1 << 60)


def test_a_disk_that_fills_up_is_one_error_naming_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.pt.part").symlink_to("/dev/full")
    with serving(Behaviour({"w.pt": DATA})) as address, pytest.raises(BundleError, match=r"w\.pt\.part: cannot be"):
        get(published(address), tmp_path / "w.pt")


def test_the_default_patience_is_limited() -> None:
    assert 0 < fetch.Patience().silence_s <= 120
    assert 0 < fetch.Patience().tries <= 10
