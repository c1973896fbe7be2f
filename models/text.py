"""Text features of a recipe's words: averaged over the ensemble, computed once, kept on disk by content."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import platformdirs
import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from flawline.models.clip import DenseClip
from flawline.models.words import Words

log = structlog.get_logger()


def text_features(clip: DenseClip, words: Words, identity: str, cache: Path | None = None) -> Tensor:
    """(D, 2) float32: unit vectors of the normal and of the abnormal ensemble, as columns in this order.

    Each sentence is normalised, the mean is taken and normalised again (APRIL-GAN). `identity` names the
    text tower (its file's hash): with it, the words and the activation, the result is kept in the folder
    `cache` (default: the user's cache) and read from there the next time. A folder that cannot be written
    costs time, not the result.
    """
    folder = platformdirs.user_cache_path("flawline") / "text" if cache is None else cache
    known = [identity, clip.activation, list(words.normal), list(words.abnormal)]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    path = folder / f"{key}.safetensors"
    try:
        pair = load_file(path)["pair"]
        if pair.shape == (clip.embed_dim, 2):
            return pair.to(clip.pixel_mean.device)
    except (OSError, KeyError, SafetensorError):
        pass
    pair = torch.stack([mean_direction(clip, words.normal), mean_direction(clip, words.abnormal)], dim=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{id(pair):x}.partial")
        save_file({"pair": pair.cpu().contiguous()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("text_cache_unwritable", folder=str(folder), error=str(error))
    return pair


@torch.no_grad()
def mean_direction(clip: DenseClip, sentences: Sequence[str]) -> Tensor:
    """n sentences -> (D,) float32, the normalised mean of their normalised features."""
    each = functional.normalize(clip.encode_text(sentences), dim=-1)
    return functional.normalize(each.mean(dim=0), dim=0)
