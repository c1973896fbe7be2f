"""`flawline models`: bundles are made, listed, described, checked and mended from the command line."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from file_server import Behaviour, serving
from tiny_bundle import write_tiny_bundle

from flawline.agent.cli import main
from flawline.agent.progress_bytes import ByteProgress
from flawline.config.errors import BundleError
from flawline.models import known_bundles
from flawline.models.bundle import Manifest, read_bundle
from flawline.models.fetch_bundle import FetchPlan, fetch_bundle
from flawline.models.known_bundles import KNOWN, AdapterFile, KnownBundle, PublishedFile, manifest_of

CLIP, SAM_H, SAM_T = (random.Random(seed).randbytes(20_000) for seed in range(3))
Run = Callable[..., tuple[int, str, str]]


def quiet(*_: object) -> None:
    pass


def published(name: str, data: bytes) -> PublishedFile:
    return PublishedFile(
        name, f"http://127.0.0.1:1/{name}", hashlib.sha256(data).hexdigest(), len(data), "MIT, example"
    )


def known(name: str = "vit-h", sam: bytes = SAM_H) -> KnownBundle:
    """As the published ones, with small files of nothing in particular."""
    return replace(KNOWN[name], clip=published("clip.pt", CLIP), sam=published(f"{name}.pth", sam))


@pytest.fixture
def flawline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr. User folders are below tmp_path."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("FLAWLINE_BUNDLES", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["flawline", *arguments])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def april_gan(path: Path, width: int = 1024, seed: int = 1) -> Path:
    """Linear layers in APRIL-GAN's published format."""
    generator = torch.Generator().manual_seed(seed)
    layers = {f"fc.{n}.weight": torch.randn(768, width, generator=generator) for n in range(4)}
    layers |= {f"fc.{n}.bias": torch.randn(768, generator=generator) for n in range(4)}
    torch.save({"trainable_linearlayer": layers}, path)
    return path


def test_a_bundle_is_fetched_once_mended_and_shares_files_with_others(tmp_path: Path) -> None:
    served = Behaviour({"clip.pt": CLIP, "vit-h.pth": SAM_H, "vit-t.pth": SAM_T})
    with serving(served) as address:
        plan = FetchPlan(known(), tmp_path, mirror=address)
        bundle = fetch_bundle(plan, quiet)
        bundle.verify()
        assert (bundle.folder / "vit-h.pth").read_bytes() == SAM_H
        assert len(served.asked) == 2

        assert fetch_bundle(plan, quiet).sha256 == bundle.sha256
        assert len(served.asked) == 2  # all was there

        (bundle.folder / "vit-h.pth").write_bytes(SAM_H[:-1] + b"x")
        with pytest.raises(BundleError, match=r"vit-h\.pth: checksum"):
            bundle.verify()
        fetch_bundle(plan, quiet).verify()
        assert len(served.asked) == 3

        other = fetch_bundle(FetchPlan(known("vit-t", SAM_T), tmp_path, mirror=address), quiet)
        other.verify()
        assert len(served.asked) == 4  # the CLIP is that of the first
    assert os.path.samefile(other.folder / "clip.pt", bundle.folder / "clip.pt")


def test_a_failed_fetch_leaves_no_bundle(tmp_path: Path) -> None:
    with serving(Behaviour({"clip.pt": CLIP})) as address, pytest.raises(BundleError, match=r"vit-h\.pth: .*404"):
        fetch_bundle(FetchPlan(known(), tmp_path, mirror=address), quiet)
    assert not (tmp_path / "vit-h" / "bundle.toml").exists()


def test_layers_are_added_and_kept_and_bring_their_activation(tmp_path: Path) -> None:
    usb = tmp_path / "usb"
    usb.mkdir()
    (usb / "clip.pt").write_bytes(CLIP)
    (usb / "vit-h.pth").write_bytes(SAM_H)
    plan = FetchPlan(known(), tmp_path / "bundles", source=usb)
    plain = fetch_bundle(plan, quiet).manifest
    assert plain.adapter is None
    assert plain.clip.activation == "quickgelu"  # as OpenAI trained the weights

    layers = april_gan(tmp_path / "mvtec_pretrained.pth")
    added = fetch_bundle(replace(plan, adapter=layers), quiet)
    added.verify()
    assert added.manifest.adapter is not None
    assert added.manifest.clip.activation == "gelu"  # as these layers were trained
    assert (added.folder / added.manifest.adapter.checkpoint).read_bytes() == layers.read_bytes()

    assert fetch_bundle(plan, quiet).manifest == added.manifest
    own = fetch_bundle(replace(plan, adapter=layers, activation="quickgelu"), quiet).manifest
    assert own.clip.activation == "quickgelu"

    elsewhere = tmp_path / "another place" / layers.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(layers.read_bytes())
    again = fetch_bundle(replace(plan, adapter=elsewhere), quiet)
    assert again.sha256 == added.sha256  # a memory learnt with one is taken by the other

    with pytest.raises(BundleError, match=r"narrow\.pth: fc\.0\.weight has shape \(768, 512\)"):
        fetch_bundle(replace(plan, adapter=april_gan(tmp_path / "narrow.pth", 512)), quiet)
    assert read_bundle(plan.folder).manifest == again.manifest


def test_layers_that_name_another_activation_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    layers = tmp_path / "mine.pth"
    told = torch.load(april_gan(layers), weights_only=True) | {"activation": "quickgelu"}
    torch.save(told, layers)
    plan = FetchPlan(known(), tmp_path / "bundles", adapter=layers, activation="gelu", source=tmp_path)
    refused = r"--activation gelu: .*mine\.pth was trained under quickgelu"
    with pytest.raises(BundleError, match=refused):  # not that the folder lacks the files
        fetch_bundle(plan, quiet)
    (tmp_path / "clip.pt").write_bytes(CLIP)
    (tmp_path / "vit-h.pth").write_bytes(SAM_H)
    assert fetch_bundle(replace(plan, activation=None), quiet).manifest.clip.activation == "quickgelu"
    with pytest.raises(BundleError, match=r"--activation gelu: .*adapter\.pth was trained under quickgelu"):
        fetch_bundle(replace(plan, adapter=None), quiet)  # those that are there already


def test_what_was_added_to_bundle_toml_survives_another_fetch(tmp_path: Path) -> None:
    usb = tmp_path / "usb"
    usb.mkdir()
    (usb / "clip.pt").write_bytes(CLIP)
    (usb / "vit-h.pth").write_bytes(SAM_H)
    plan = FetchPlan(known(), tmp_path / "bundles", source=usb, adapter=april_gan(tmp_path / "first.pth"))
    file = fetch_bundle(plan, quiet).folder / "bundle.toml"
    own = (
        '# tuned\nprecision = "fp16"\n[thresholds]\nregion = 0.31\ndecision = 0.62\n[prompts]\ntemplates = ["a {}."]\n'
    )
    comment, _, tables = own.partition("[")
    file.write_text(comment + file.read_text() + "\n[" + tables)
    text = file.read_text()
    again = fetch_bundle(replace(plan, adapter=None), quiet)
    assert file.read_text() == text
    assert again.manifest.thresholds.region == 0.31

    other = fetch_bundle(replace(plan, adapter=april_gan(tmp_path / "second.pth", seed=2)), quiet)
    assert other.manifest.precision == "fp16"
    assert other.manifest.prompts.templates == ("a {}.",)
    assert not other.manifest.states_thresholds  # those were of the first layers' scale
    other.verify()


def test_two_fetches_of_one_bundle_do_not_meet(tmp_path: Path) -> None:
    plan = FetchPlan(known(), tmp_path, source=tmp_path)

    def fetch_again(*_: object) -> None:
        with pytest.raises(BundleError, match="another process is fetching"):
            fetch_bundle(plan, quiet)

    (tmp_path / "clip.pt").write_bytes(CLIP)
    (tmp_path / "vit-h.pth").write_bytes(SAM_H)
    fetch_bundle(plan, fetch_again)


@pytest.mark.parametrize("name", list(KNOWN))
def test_every_known_bundle_has_a_valid_manifest(name: str) -> None:
    text = manifest_of(KNOWN[name], AdapterFile("adapter.pth", "0" * 64, "somewhere"), None)
    import tomllib

    manifest = Manifest.model_validate(tomllib.loads(text))
    assert manifest.name == name
    assert manifest.clip.input_size == 518
    assert manifest.clip.taps is None  # the quarters of 24 blocks: 6, 12, 18, 24
    assert all(file.source and file.licence for file in manifest.files)
    assert KNOWN[name].clip.sha256 in KNOWN[name].clip.url  # OpenAI's addresses hold the checksum


def test_list_shows_what_is_here_and_what_could_be(flawline: Run, tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "data" / "flawline" / "bundles" / "tiny")
    code, out, _ = flawline("models", "list", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert {"vit-h", "vit-l", "vit-b", "vit-t"} <= rows.keys()
    assert not rows["vit-h"]["installed"]
    tiny = rows["tiny"]
    assert tiny["installed"]
    assert tiny["folder"] == str(folder)
    names = ("clip.json", "clip.safetensors", "sam.safetensors", "adapter.safetensors")
    assert tiny["size"] == sum((folder / name).stat().st_size for name in names)
    code, out, _ = flawline("models", "list")
    assert code == 0
    assert str(folder) in out
    assert "flawline models fetch vit-t" in out
    assert "Apache-2.0, MIT" in out


def test_info_describes_a_bundle_here_and_one_to_come(flawline: Run, tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "tiny")
    code, out, _ = flawline("models", "info", str(folder), "--json")
    about = json.loads(out)
    assert code == 0
    assert about["manifest"]["clip"]["input_size"] == 64
    assert about["sha256"] == hashlib.sha256((folder / "bundle.toml").read_bytes()).hexdigest()
    code, out, _ = flawline("models", "info", str(folder))
    assert "clip.input_size" in out
    code, out, _ = flawline("models", "info", "vit-h", "--json")
    assert json.loads(out)["files"][1]["size"] == 2_564_550_879
    code, _, err = flawline("models", "info", "nothing")
    assert (code, err.count("\n")) == (2, 1)


def test_verify_names_the_file_that_differs(flawline: Run, tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "tiny")
    code, out, _ = flawline("models", "verify", str(folder))
    assert (code, out.count("\n")) == (0, 1)
    with (folder / "sam.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    code, _, err = flawline("models", "verify", str(folder))
    assert (code, err.count("\n")) == (2, 1)
    assert "sam.safetensors" in err
    (folder / "clip.json").unlink()
    code, _, err = flawline("models", "verify", str(folder))
    assert (code, err.count("\n")) == (2, 1)
    assert "clip.json" in err


def test_fetch_from_the_command_line(flawline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_bundles.KNOWN, "vit-t", known("vit-t", SAM_T))
    with serving(Behaviour({"clip.pt": CLIP, "vit-t.pth": SAM_T}, cuts=[5_000])) as address:
        code, out, err = flawline("models", "fetch", "vit-t", "--mirror", address)
    assert code == 0
    folder = tmp_path / "data" / "flawline" / "bundles" / "vit-t"
    assert str(folder) in out
    assert "training-free localiser" in out
    assert "vit-t.pth: 0.0 MB of 0.0 MB" in err
    assert flawline("models", "verify", "vit-t")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["vit-x"],
        ["vit-h", "--mirror", "ftp://example"],
        ["vit-h", "--mirror", "http://127.0.0.1:1", "--from", "."],
        ["vit-h", "--from", "/nowhere"],
        ["vit-h", "--from", "."],
        ["vit-h", "--adapter", "/nowhere.pth"],
    ],
)
def test_a_wrong_fetch_is_one_line(
    flawline: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = flawline("models", "fetch", *arguments)
    assert (code, err.count("\n")) == (2, 1)


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress(every_s=0.0) as progress:
        for here in (0, 500_000, 1_000_000, 1_000_000):
            progress.update("a.pt", here, 1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "a.pt: 0.0 MB of 1.0 MB",
        "a.pt: 0.5 MB of 1.0 MB",
        "a.pt: 1.0 MB of 1.0 MB",
    ]
