"""Weight files as the world publishes them: safetensors, pickles without code, TorchScript archives."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flawline.config.errors import BundleError

StateDict = dict[str, Tensor]

DRAWN = frozenset({"normal_", "uniform_", "erfinv_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"})


def read_state_dict(path: Path) -> StateDict:
    """All tensors of a weight file on the CPU, by name, in the file's own precision.

    A pickle is read with `weights_only=True`, so it can't run code. A TorchScript archive (OpenAI's CLIP)
    is told by its code folder and read by `torch.jit`. A table under one of the usual keys is unwrapped.
    Raises BundleError naming the file.
    """
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            return load_file(path)
        if _is_torchscript(path):
            with warnings.catch_warnings():  # torch would have the user rewrite OpenAI's files
                warnings.simplefilter("ignore", FutureWarning)
                archive = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return {name: tensor.detach() for name, tensor in archive.state_dict().items()}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what reads a damaged archive or pickle fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"{path}: not a readable weight file: {reason}") from error
    return _tensors(content, path)


def metadata(path: Path) -> dict[str, str]:
    """What a file of tensors says of itself besides them: safetensors' own table, or the texts at the top of a pickle.

    Nothing for another file or a damaged one.
    """
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            with safe_open(path, framework="pt") as content:
                return dict(content.metadata() or {})
        table = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # as in `read_state_dict`, which says why
        return {}
    texts = table.items() if isinstance(table, Mapping) else ()
    return {name: value for name, value in texts if isinstance(name, str) and isinstance(value, str)}


def _is_safetensors(path: Path) -> bool:
    """Whatever it is called: its head's length in eight bytes, then JSON."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(1) == b"{" and length < path.stat().st_size


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _tensors(content: object, path: Path) -> StateDict:
    if isinstance(content, Mapping):
        for key in ("state_dict", "model", "trainable_linearlayer", "linear_layers", "prompt_learner"):
            if isinstance(content.get(key), Mapping):
                return _tensors(content[key], path)
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return {name.removeprefix("module."): value for name, value in tensors.items()}
    raise BundleError(f"{path}: holds no table of tensors")


class Undrawn(TorchFunctionMode):
    """A module built inside is not filled with random numbers: its weights are loaded next, each of them.

    For ViT-L and ViT-H the numbers take as long to draw as the weights to read.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in DRAWN:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def load_weights(module: nn.Module, state: StateDict, path: Path) -> None:
    """Copy `state` into `module`, every name and shape in agreement. Raises BundleError naming the file."""
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    if missing or unknown:
        raise BundleError(
            f"{path}: does not fit the architecture in bundle.toml: "
            f"{len(missing)} tensors missing{_first(missing)}, {len(unknown)} unknown{_first(unknown)}"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise BundleError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, the architecture in bundle.toml "
                f"needs {tuple(tensor.shape)}"
            )
    module.load_state_dict(state)


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
