"""Loading a bundle: what is broken is named, and what it lacks has something in its place."""

import hashlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tomli_w
import torch
from safetensors.torch import save_file
from tiny_bundle import picture, write_tiny_bundle

from flawline.config.errors import BundleError, ConfigError, FlawlineError
from flawline.config.recipe import Recipe
from flawline.models.bundle import read_bundle
from flawline.models.inspector import Inspector


def rewrite(folder: Path, change: Any) -> None:
    """Change the tree of bundle.toml, and bring its checksums up to date."""
    tree = tomllib.loads((folder / "bundle.toml").read_text())
    change(tree)
    for file in tree["files"]:
        if (folder / file["name"]).is_file():
            file["sha256"] = hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
    (folder / "bundle.toml").write_text(tomli_w.dumps(tree))


def nothing(tree: Any) -> None:
    pass


def words(key: str, sentence: str, count: int = 1) -> Callable[[Any], None]:
    return lambda tree: tree.setdefault("prompts", {}).update({key: [sentence] * count})


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "bundle.toml").unlink(), r"bundle\.toml"),
        (lambda f: (f / "bundle.toml").write_text("name ="), r"bundle\.toml: not valid TOML"),
        (lambda f: rewrite(f, lambda tree: tree.update(colour="red")), r"bundle\.toml: colour"),
        (lambda f: rewrite(f, lambda tree: tree["clip"].update(taps=[1, 9])), r"bundle\.toml: clip\.taps"),
        (lambda f: rewrite(f, lambda tree: tree["sam"]["decoder"].update(heads=7)), r"bundle\.toml: .*divide"),
        (lambda f: rewrite(f, lambda tree: tree["adapter"].update(temperature=float("inf"))), r"bundle\.toml: adapter"),
        (lambda f: (f / "sam.safetensors").unlink(), r"sam\.safetensors"),
        (lambda f: (f / "clip.safetensors").write_bytes(b"x" * 100), r"clip\.safetensors: checksum"),
        (lambda f: ((f / "clip.safetensors").write_bytes(b"x" * 100), rewrite(f, nothing)), r"clip\.safetensors"),
        (lambda f: ((f / "clip.json").write_text("{"), rewrite(f, nothing)), r"clip\.json"),
        (lambda f: ((f / "clip.json").write_text("[]"), rewrite(f, nothing)), r"clip\.json: a model configuration"),
        (lambda f: rewrite(f, words("templates", "x {foo}")), r"bundle\.toml: prompts\.templates"),
        (lambda f: rewrite(f, words("templates", "x {} {} {")), r"bundle\.toml: prompts\.templates"),
        (lambda f: rewrite(f, words("templates", "x {}", 129)), r"bundle\.toml: prompts\.templates"),
        (lambda f: rewrite(f, words("states_normal", "{0} {1}")), r"bundle\.toml: prompts\.states_normal"),
        (
            lambda f: (save_file({"fc.0.weight": torch.ones(32, 64)}, f / "adapter.safetensors"), rewrite(f, nothing)),
            r"adapter\.safetensors: does not fit",
        ),
        (lambda f: rewrite(f, lambda tree: tree["sam"]["decoder"].update(mlp_dim=96)), r"sam\.safetensors: .*shape"),
    ],
)
def test_a_broken_bundle_names_what_is_broken(tmp_path: Path, spoil: Any, named: str) -> None:
    folder = write_tiny_bundle(tmp_path / "tiny")
    spoil(folder)
    with pytest.raises(BundleError, match=named) as raised:
        Inspector.load(folder, device="cpu")
    assert "\n" not in str(raised.value)


def test_an_unknown_bundle_says_what_there_is() -> None:
    with pytest.raises(BundleError, match="no bundle 'nowhere'"):
        Inspector.load("nowhere", device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'cuda'") as raised:
        Inspector.load(write_tiny_bundle(tmp_path / "tiny"), device="cuda")
    assert "\n" not in str(raised.value)
    assert issubclass(ConfigError, FlawlineError)


def test_a_bundle_without_layers_is_served_by_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bare = Inspector.load(write_tiny_bundle(tmp_path / "bare", adapter=False), device="cpu")
    result = bare.inspect(picture(64, 64))
    assert result.anomaly_map.shape == (64, 64)
    assert 0.0 <= result.score <= 1.0
    with pytest.raises(BundleError, match="no adapter"):
        bare.inspect(picture(64, 64), Recipe(localiser="adapter"))


def test_the_bundle_that_the_documents_describe_opens(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundles.md").read_text()
    shown = page.split("```toml\n")[1].split("```")[0]
    for comment in ("# taps", "# [adapter]", "# checkpoint"):  # what is shown as a choice fits too
        assert comment in shown
        shown = shown.replace(comment, comment.removeprefix("# "))
    file = '\n[[files]]\nname = "mine.safetensors"\nsha256 = "' + "0" * 64 + '"\nlicence = "MIT"\n'
    (tmp_path / "bundle.toml").write_text(shown + file)
    manifest = read_bundle(tmp_path).manifest
    assert manifest.adapter is not None
    assert manifest.clip.taps == (3, 6, 9, 12)
    assert open_clip.get_model_config(str(manifest.clip.architecture))["vision_cfg"]["layers"] == 12
