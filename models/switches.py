"""Which of the faster ways are taken: each can be switched off alone, to measure it or to do without it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

from flawline.config.errors import ConfigError

VARIABLE = "FLAWLINE_SWITCHES"
"""Of the environment, as in `attention=plain,graphs=on`; the running agent's worker takes it over."""

Attention = Literal["auto", "plain", "mask", "extended"]
Switch = Literal["on", "off"]
Heap = Literal["kept", "plain"]
BatchNorm = Literal["folded", "plain"]


@dataclass(frozen=True)
class Switches:
    """The defaults are what the agent runs with; `PLAIN` is everything as the libraries have it."""

    attention: Attention = "auto"  # of SAM's ViT; see models/sam_attention.py
    heap: Heap = "kept"  # of processes that run models; see models/heap.py
    batchnorm: BatchNorm = "folded"  # of small image encoders; see models/fold.py
    graphs: Switch = "off"  # CUDA graphs; see models/graphs.py. Off until they have been run on a GPU

    @classmethod
    def parse(cls, items: Iterable[str], where: str) -> Self:
        """From `name=value` items. Raises ConfigError that begins with `where`."""
        allowed = {
            "attention": get_args(Attention),
            "heap": get_args(Heap),
            "batchnorm": get_args(BatchNorm),
            "graphs": get_args(Switch),
        }
        chosen = {}
        for item in items:
            name, _, value = item.strip().partition("=")
            if name not in allowed:
                raise ConfigError(f"{where}: {name!r} is no switch; there are {', '.join(allowed)}")
            if value not in allowed[name]:
                raise ConfigError(f"{where}: {name} is one of {', '.join(allowed[name])}, not {value!r}")
            chosen[name] = value
        return cls(**chosen)  # type: ignore[arg-type]  # checked above

    @classmethod
    def from_environment(cls) -> Self:
        """What `FLAWLINE_SWITCHES` says; the defaults where it is not set. Raises ConfigError naming it."""
        text = os.environ.get(VARIABLE, "")
        return cls.parse(filter(None, (part.strip() for part in text.split(","))), VARIABLE)

    def as_dict(self) -> dict[str, str]:
        """Name and value of each."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


PLAIN = Switches(attention="plain", heap="plain", batchnorm="plain")
