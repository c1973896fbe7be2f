"""Anomaly maps of one class on disk while it is evaluated, so that memory is bounded and a run can go on.

One file of raw float32 per row of the study, maps one after the other, and `done.jsonl`: first the run's
signature, then one line per picture, written after its maps. What an interruption left half-written is cut off.
No torch here.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flawline.config.errors import FlawlineError
from flawline.models.metrics import Scores

ITEM = 4  # bytes of a float32


@dataclass(frozen=True)
class Judged:
    """What one picture got in every row: maps of one size, image scores, and times in milliseconds."""

    maps: Mapping[str, Scores]
    scores: Mapping[str, float]
    stage_ms: Mapping[str, Mapping[str, float]]


class MapStore:
    """Append pictures in order; read maps back one by one."""

    def __init__(self, folder: Path, keys: Sequence[str], signature: str) -> None:
        """Opens what an earlier run with the same signature left, else starts anew."""
        self._folder = folder
        self._keys = list(keys)
        self._log = folder / "done.jsonl"
        self.lines: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._load(signature)
        except OSError as error:
            raise FlawlineError(f"{folder}: cannot be written: {error.strerror or error}") from error

    def _load(self, signature: str) -> None:
        text = self._log.read_text(encoding="utf-8") if self._log.is_file() else ""
        lines = text.split("\n")[:-1]  # what follows the last newline was not finished
        if lines and lines[0] == json.dumps({"signature": signature}):
            sizes = {key: self._file(key).stat().st_size if self._file(key).is_file() else 0 for key in self._keys}
            needed = 0
            for line in lines[1:]:
                entry = json.loads(line)
                needed += int(np.prod(entry["shape"])) * ITEM
                if any(size < needed for size in sizes.values()):
                    break
                self.lines.append(entry)
        kept = [json.dumps({"signature": signature}), *(json.dumps(entry) for entry in self.lines)]
        self._log.write_text("\n".join(kept) + "\n", encoding="utf-8")
        for key in self._keys:
            with self._file(key).open("ab") as stream:
                stream.truncate(self._offset(len(self.lines)) * ITEM)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.f32"

    def _offset(self, number: int) -> int:
        """Pixels before map `number`."""
        return sum(int(np.prod(entry["shape"])) for entry in self.lines[:number])

    def __len__(self) -> int:
        return len(self.lines)

    def append(self, path: Path, judged: Judged) -> None:
        """Add one picture. Raises FlawlineError naming the folder where the disk is full."""
        shape = list(judged.maps[self._keys[0]].shape)
        entry = {
            "path": str(path),
            "shape": shape,
            "scores": dict(judged.scores),
            "stage_ms": {key: dict(times) for key, times in judged.stage_ms.items()},
        }
        try:
            for key in self._keys:
                if list(judged.maps[key].shape) != shape:
                    raise ValueError(f"row {key}: a map of {judged.maps[key].shape}, the others are {shape}")
                with self._file(key).open("ab") as stream:
                    stream.write(np.ascontiguousarray(judged.maps[key], np.float32).tobytes())
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise FlawlineError(f"{self._folder}: cannot be written: {os.strerror(error.errno or 0)}") from error
        self.lines.append(entry)

    def maps(self, key: str, numbers: Sequence[int] | None = None) -> Iterator[Scores]:
        """The maps of one row, (H_i, W_i) float32 each, in order, or those with these numbers."""
        offsets = np.concatenate([[0], np.cumsum([int(np.prod(entry["shape"])) for entry in self.lines])])
        with self._file(key).open("rb") as stream:
            for number in range(len(self.lines)) if numbers is None else numbers:
                stream.seek(int(offsets[number]) * ITEM)
                shape = self.lines[number]["shape"]
                yield np.fromfile(stream, np.float32, int(np.prod(shape))).reshape(shape)

    def scores(self, key: str) -> list[float]:
        """Image scores of one row."""
        return [float(entry["scores"][key]) for entry in self.lines]

    def stage_ms(self, key: str) -> dict[str, float]:
        """Median milliseconds per stage of one row; empty where it has none."""
        stages = [entry["stage_ms"].get(key, {}) for entry in self.lines]
        names = {name for times in stages for name in times}
        return {name: float(np.median([times[name] for times in stages if name in times])) for name in sorted(names)}
