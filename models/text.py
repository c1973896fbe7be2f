"""Text features of a recipe's words: averaged over the ensemble, computed once, kept on disk by content."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ConfigError
from flawline.models.clip import DenseClip
from flawline.models.words import Words

log = structlog.get_logger()


@dataclass(frozen=True)
class TextFeatures:
    """What the text tower says of a recipe's words."""

    pair: Tensor  # (D, 2) float32: unit vectors of the normal and of the abnormal ensemble, as columns
    cut: int  # sentences of which the tower does not read the end

    def warning(self, clip: DenseClip, words: Words) -> str | None:
        """What to warn of; None where every sentence is read to its end."""
        if not self.cut:
            return None
        count = len(words.normal) + len(words.abnormal)
        return f"{self.cut} of the recipe's {count} sentences {_too_long(clip)}: shorten its object or states"


def text_features(clip: DenseClip, words: Words, identity: str, cache: Path | None = None) -> TextFeatures:
    """The direction of good parts and that of defective ones.

    Each sentence is normalised, the mean is taken and normalised again (APRIL-GAN). `identity` names the
    text tower (its file's hash): with it, the words and the activation, the result is kept in the folder
    `cache` (default: the user's cache) and read from there the next time. A folder that cannot be written
    costs time, not the result. Raises ConfigError where so much is cut off that a defective part reads like a good
    one: nothing would ever be found.
    """
    folder = platformdirs.user_cache_path("flawline") / "text" if cache is None else cache
    known = [identity, clip.activation, list(words.normal), list(words.abnormal)]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    path = folder / f"{key}.safetensors"
    try:
        kept = load_file(path)
        if kept["pair"].shape == (clip.embed_dim, 2):
            return TextFeatures(kept["pair"].to(clip.pixel_mean.device), int(kept["cut"]))
    except (OSError, KeyError, SafetensorError):
        pass
    cut = clip.cut([*words.normal, *words.abnormal])
    if cut:
        _refuse_alike(clip, words)
    pair = torch.stack([mean_direction(clip, words.normal), mean_direction(clip, words.abnormal)], dim=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{id(pair):x}.partial")
        save_file({"pair": pair.cpu().contiguous(), "cut": torch.tensor(len(cut))}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("text_cache_unwritable", folder=str(folder), error=str(error))
    return TextFeatures(pair, len(cut))


def _refuse_alike(clip: DenseClip, words: Words) -> None:
    read = [tuple(row) for row in clip.tokens([*words.normal, *words.abnormal]).tolist()]
    good = dict(zip(read, words.normal, strict=False))
    for row, sentence in zip(read[len(words.normal) :], words.abnormal, strict=True):
        if row in good:
            raise ConfigError(
                f"object, states_abnormal: {sentence!r} and {good[row]!r} {_too_long(clip)} and read alike "
                "without it: shorten the recipe's object or states"
            )


def _too_long(clip: DenseClip) -> str:
    return f"are longer than the {clip.context_length} tokens that the bundle reads; the end is cut off"


@torch.no_grad()
def mean_direction(clip: DenseClip, sentences: Sequence[str]) -> Tensor:
    """n sentences -> (D,) float32, the normalised mean of their normalised features."""
    each = functional.normalize(clip.encode_text(sentences), dim=-1)
    return functional.normalize(each.mean(dim=0), dim=0)
