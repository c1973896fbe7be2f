"""Learning on the running line, in the worker: collects the parts it is given, then makes and keeps the memory."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import FlawlineError
from flawline.config.memory_versions import next_file
from flawline.config.recipe import Recipe
from flawline.models.inspector import Inspector
from flawline.models.memory_file import write_memory
from flawline.models.memory_learn import Learner


class MemorySession:
    """One collection of good parts for one recipe. `add` and `commit` may come from two threads, in this order."""

    def __init__(self, inspector: Inspector, name: str, recipe: Recipe) -> None:
        self._name = name
        self._learner = Learner(inspector, name, recipe)
        self._closed = False
        self._refused: list[str] = []

    def add(self, picture: NDArray[np.uint8], name: str) -> None:
        """One good part; one that cannot be learnt from is only counted."""
        if self._closed:
            return
        try:
            self._learner.add(picture, name)
        except FlawlineError as error:
            self._refused.append(str(error))

    def refuse(self, text: str) -> None:
        """A part that could not be judged, so nothing was learnt from it."""
        self._refused.append(text)

    def status(self) -> dict[str, Any]:
        """How many different parts there are, and which could not be used."""
        return {"collected": len(self._learner), "refused": self._refused[-20:], "refusals": len(self._refused)}

    def commit(self, folder: Path, keep_all: bool) -> dict[str, Any]:
        """Make the memory and write its file into `folder`. Raises ConfigError where there is nothing to learn."""
        self._closed = True
        try:
            learnt = self._learner.learn(keep_all=keep_all)
            memory = learnt.memory
            path = next_file(folder, self._name, memory.sha256)
            write_memory(path, memory)
        except FlawlineError:
            self._closed = False
            raise
        shown = [
            {"name": one.name, "use": one.use, "distance": one.distance, "typical": one.typical}
            for one in learnt.pictures
        ]
        return {
            "memory": str(path),
            "memory_sha256": memory.sha256,
            "pictures": shown,
            "by_words": learnt.by_words,
            "lie_alike": memory.about.place > 0.0,
        }
