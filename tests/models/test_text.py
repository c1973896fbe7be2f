"""Text features: the ensemble is a plain mean over sentences, and the cache on disk never says something else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from tiny_bundle import write_tiny_bundle

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.bundle import PromptWords, open_bundle
from flawline.models.clip import DenseClip
from flawline.models.text import text_features
from flawline.models.words import STATES_ABNORMAL, STATES_NORMAL, TEMPLATES, Words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


class CountingClip(DenseClip):
    """Counts the sentences that are really encoded."""

    encoded = 0

    def encode_text(self, sentences: Sequence[str]) -> torch.Tensor:
        self.encoded += len(sentences)
        return super().encode_text(sentences)


@pytest.fixture
def clip(folder: Path) -> CountingClip:
    bundle = open_bundle(folder)
    made = CountingClip(bundle.manifest.clip, folder)
    made.load(bundle.path("clip.safetensors"))
    return made


FEW = Words(("a photo of a flawless screw.", "a screw."), ("a damaged screw.", "a broken screw.", "a bad screw."))


def test_the_standard_words_are_april_gans() -> None:
    assert (len(STATES_NORMAL), len(STATES_ABNORMAL), len(TEMPLATES)) == (7, 5, 35)
    words = Words.of(Recipe(object="metal nut"), PromptWords.model_validate({}))
    assert (len(words.normal), len(words.abnormal)) == (245, 175)
    assert len(set(words.normal)) == 245
    assert "a photo of the cool metal nut without flaw." in words.normal
    assert "this is one damaged metal nut in the scene." in words.abnormal


def test_a_recipes_own_words_come_before_the_bundles() -> None:
    bundle = PromptWords.model_validate({"states_normal": ("clean {}",), "templates": ("{}!",)})
    own = Recipe(object="gear", states_abnormal=("scratched {}", "rusty {}"))
    words = Words.of(own, bundle)
    assert words.normal == ("clean gear!",)
    assert words.abnormal == ("scratched gear!", "rusty gear!")


def test_the_ensemble_is_the_mean_of_unit_vectors_sentence_by_sentence(clip: CountingClip, tmp_path: Path) -> None:
    words = Words.of(Recipe(object="screw", states_normal=("{}", "flawless {}")), PromptWords.model_validate({}))
    pair = text_features(clip, words, "tower", tmp_path).pair
    tokenizer = open_clip.get_tokenizer("ViT-L-14-336")
    for column, sentences in enumerate((words.normal, words.abnormal)):
        total = np.zeros(32)
        for sentence in sentences:
            with torch.no_grad():
                feature = clip.model.encode_text(tokenizer([sentence]))[0].numpy().astype(float)
            total += feature / np.linalg.norm(feature)
        np.testing.assert_allclose(pair[:, column].numpy(), total / np.linalg.norm(total), atol=1e-5)


def test_what_is_known_is_not_encoded_again(clip: CountingClip, tmp_path: Path) -> None:
    first = text_features(clip, FEW, "tower", tmp_path).pair
    assert clip.encoded == 5
    torch.testing.assert_close(text_features(clip, FEW, "tower", tmp_path).pair, first, rtol=0, atol=0)
    assert clip.encoded == 5
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # no leftover of the writing


def test_other_words_another_tower_another_activation_are_encoded(
    clip: CountingClip, folder: Path, tmp_path: Path
) -> None:
    first = text_features(clip, FEW, "tower", tmp_path).pair
    text_features(clip, FEW, "another tower", tmp_path)
    assert clip.encoded == 10
    swapped = text_features(clip, Words(FEW.abnormal, FEW.normal), "tower", tmp_path).pair
    assert clip.encoded == 15
    torch.testing.assert_close(swapped, first.flip(1))
    quick = CountingClip(clip.settings.model_copy(update={"activation": "quickgelu"}), folder)
    text_features(quick, FEW, "tower", tmp_path)
    assert quick.encoded == 5


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 200, None])
def test_a_corrupt_cache_is_ignored_and_replaced(clip: CountingClip, tmp_path: Path, content: bytes | None) -> None:
    first = text_features(clip, FEW, "tower", tmp_path).pair
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7] if content is None else content)
    torch.testing.assert_close(text_features(clip, FEW, "tower", tmp_path).pair, first)
    assert clip.encoded == 10
    torch.testing.assert_close(text_features(clip, FEW, "tower", tmp_path).pair, first)
    assert clip.encoded == 10


def test_a_cache_that_cannot_be_written_costs_time_only(clip: CountingClip, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    pair = text_features(clip, FEW, "tower", tmp_path / "file" / "below").pair
    torch.testing.assert_close(pair, text_features(clip, FEW, "tower", tmp_path).pair)


def test_words_whose_end_is_not_read_are_said_and_refused_where_they_say_nothing_any_more(
    clip: CountingClip, tmp_path: Path
) -> None:
    assert clip.context_length == 77
    name = "hexagon socket head cap screw " * 20
    begins = Words(("a flawless " + name,), ("a damaged " + name,))
    assert clip.cut([*begins.normal, "a screw.", *begins.abnormal]) == [*begins.normal, *begins.abnormal]
    for _ in range(2):  # from the tower, then from the cache
        warning = text_features(clip, begins, "tower", tmp_path).warning(clip, begins)
        assert warning is not None
        assert "2 of the recipe's 2 sentences are longer than the 77 tokens" in warning
    assert text_features(clip, FEW, "tower", tmp_path).warning(clip, FEW) is None
    with pytest.raises(ConfigError, match=r"object, states_abnormal.*77 tokens"):
        text_features(clip, Words((name,), (name + " with damage",)), "tower", tmp_path)
    exact = "screw " * 75  # and its two ends: 77
    assert clip.cut([exact, exact + "screw"]) == [exact + "screw"]
