"""A memory's file: one safetensors, its content hashed, refused where it belongs to other models or pictures."""

import contextlib
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.bundle import Bundle
from flawline.models.memory import About, Memory
from flawline.models.registration import Registration
from flawline.models.words import Words

SCHEMA = "flawline.memory/1"


def make_memory(about: About, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> Memory:
    """From half precision tensors as `Memory.stored` gives them."""
    ready = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    registration = Registration(ready["directions"], ready["reference"]) if "reference" in ready else None
    return Memory(
        about,
        content_sha256(about, tensors),
        ready["bank"],
        ready["layouts"],
        ready.get("projection"),
        registration,
    )


def content_sha256(about: About, tensors: dict[str, Tensor]) -> str:
    """Of everything that judges; not of when or where it was learnt, so that the same pictures give the same."""
    digest = hashlib.sha256(about.model_dump_json(exclude_defaults=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def words_sha256(words: Words) -> str:
    """Of the sentences: the zero-shot map's scale holds for these alone."""
    return hashlib.sha256(json.dumps([words.normal, words.abnormal]).encode()).hexdigest()


def write_memory(path: Path, memory: Memory) -> None:
    """Write the file as a whole or not at all. Raises ConfigError naming it."""
    metadata = {
        "schema": SCHEMA,
        "about": memory.about.model_dump_json(),
        "sha256": memory.sha256,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(save(memory.stored(), metadata))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # the error that is on its way says more
            partial.unlink(missing_ok=True)


def read_memory(path: Path, device: torch.device | str = "cpu") -> Memory:
    """Read and check a file. Raises ConfigError naming it where it is missing, damaged or no memory."""
    try:
        with safe_open(path, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: this memory does not exist; make it with `flawline learn`") from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: is not a readable memory: {error}") from error
    try:
        if metadata.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {metadata.get('schema')!r}, not {SCHEMA!r}")
        about = About.model_validate_json(metadata["about"])
        memory = make_memory(about, tensors, device)
    except (ValidationError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: is no memory of good parts: {str(error).splitlines()[0]}") from error
    if memory.sha256 != metadata.get("sha256"):
        raise ConfigError(f"{path}: its content does not have the hash that it names: the file is damaged")
    return memory


def fitting_memory(recipe: Recipe, bundle: Bundle, words: Words, localiser: str, device: torch.device) -> Memory | None:
    """The recipe's memory, None where it has none. Raises ConfigError naming the file where it was learnt with
    another bundle, other words, another region or other tiles."""
    if recipe.memory is None:
        return None
    path = Path(recipe.memory)
    memory = read_memory(path, device)
    about = memory.about
    if about.bundle_sha256 != bundle.sha256:
        raise ConfigError(
            f"{path}: was learnt with bundle {about.bundle!r} ({about.bundle_sha256[:12]}…), this is {bundle.name!r} "
            f"({bundle.sha256[:12]}…): learn again with `flawline learn`"
        )
    differing = {
        "words": about.words_sha256 != words_sha256(words),
        "localiser": about.localiser != localiser,
        "roi": about.roi != recipe.roi,
        "ignore": about.ignore != recipe.ignore,
        "tiling": about.tiling != recipe.tiling,
        "memory_rotations": about.rotations != recipe.memory_rotations,
        "memory_registration": about.registered != recipe.memory_registration,
    }
    if any(differing.values()):
        names = ", ".join(name for name, differs in differing.items() if differs)
        raise ConfigError(f"{path}: was learnt with other {names} than the recipe has now: learn again")
    return memory
