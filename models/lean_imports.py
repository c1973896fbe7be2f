"""Importing the model libraries without what they load besides: a third of a worker's start.

* torchvision and timm load torch's compiler while they are imported, each for one function that no eager forward calls.
* open_clip loads transformers, where that is installed, for the few CLIPs whose text tower is from there.
* Python's garbage collector looks through all that has been imported again and again.

Only the worker's process does this; in the Python API the libraries are imported as they are.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import reload
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo.utils"


class _Watch:
    """Asked before any module is looked for: prepares for torchvision, and hides transformers."""

    def __init__(self) -> None:
        self._restore: list[tuple[Any, str, Any]] = []
        self._stand_in: ModuleType | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Finds nothing itself."""
        if name == "transformers":
            raise ModuleNotFoundError("put off until a model needs it", name=name)
        if name == "torchvision":
            self._put_the_compiler_off()

    def _put_the_compiler_off(self) -> None:
        import torch

        if "torch._dynamo" in sys.modules:
            return
        self._stand_in = ModuleType(COMPILER)
        self._stand_in.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
        sys.modules[COMPILER] = self._stand_in
        self._restore.append((torch.compiler, "disable", torch.compiler.disable))
        torch.compiler.disable = _leave_alone

    def undo(self) -> None:
        """Everything is as it was; what was put off is loaded by whoever asks for it."""
        for owner, name, value in self._restore:
            setattr(owner, name, value)
        if self._stand_in is not None and sys.modules.get(COMPILER) is self._stand_in:
            del sys.modules[COMPILER]


def _is_compile_supported(device_type: str) -> Any:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)


def _leave_alone(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
    """`torch.compiler.disable` for functions that are never compiled."""
    return (lambda given: given) if fn is None else fn


@contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported inside leaves out what the first lines name, as far as it isn't there yet."""
    watch = _Watch()
    collecting = gc.isenabled()
    gc.disable()
    sys.meta_path.insert(0, watch)
    try:
        yield
    finally:
        sys.meta_path.remove(watch)
        watch.undo()
        if collecting:
            gc.enable()


def with_transformers() -> None:
    """Called before a text tower of transformers is built: gives open_clip what it has been spared."""
    module = sys.modules["open_clip.hf_model"]
    if getattr(module, "transformers", None) is None:
        reload(module)  # its classes stay those that open_clip holds: they look their names up in the same module
