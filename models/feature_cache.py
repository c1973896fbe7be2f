"""Features of the frozen image tower, kept on disk under the picture's and the tower's identity."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import platformdirs
import structlog
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flawline.config.errors import ConfigError, ImageError
from flawline.models.clip import DenseClip
from flawline.models.frames import squash, upload
from flawline.models.ground_truth import read_rgb

log = structlog.get_logger()

SHARE_OF_DISK = 0.5  # of what is free when the cache is made


def default_folder() -> Path:
    """Where features are kept if nothing else is said."""
    return platformdirs.user_cache_path("flawline") / "features"


class FeatureCache:
    """Taps of a picture, (1, C_i, h_i, w_i) each, in the tower's own precision, so that a cached run gives the
    same numbers as one without. Full, or on a disk that can't be written, it computes anew each time."""

    def __init__(self, clip: DenseClip, identity: str, folder: Path | None, limit_bytes: int | None = None) -> None:
        """`identity`: hash of the tower's weights. `folder` None: nothing is kept. `limit_bytes`: default half
        of the free disk. Raises ConfigError where the folder cannot be made."""
        self._clip = clip
        own = clip.settings.model_dump(mode="json")  # the same weights in another architecture, under another mean
        arithmetic = [str(clip.dtype), clip.pixel_mean.device.type]
        self._identity = [identity, own, clip.activation, clip.input_size, list(clip.indices), *arithmetic]
        self._folder = folder
        self.left_bytes = 0  # that may still be written
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                free = int(shutil.disk_usage(folder).free * SHARE_OF_DISK)
            except OSError as error:
                raise ConfigError(
                    f"--cache {folder}: CLIP's features cannot be kept there: {error.strerror or error}; give another "
                    "folder, or --no-cache"
                ) from error
            self.left_bytes = free if limit_bytes is None else min(limit_bytes, free)

    @torch.no_grad()
    def encode(self, picture: NDArray[np.uint8]) -> list[Tensor]:
        """(H, W, 3) uint8 RGB -> taps on the tower's device, not cached."""
        pixels = upload(picture, self._clip.pixel_mean.device)
        return self._clip.dense(self._clip.normalise(squash(pixels, self._clip.input_size))).taps

    def __call__(self, path: Path) -> list[Tensor]:
        """Taps of the picture in the file `path`. Raises ImageError where it can't be read."""
        file = self._file(path)
        if file is None:
            return self.encode(read_rgb(path))
        try:
            stored = load_file(file)
            return [stored[str(number)].to(self._clip.pixel_mean.device) for number in range(len(stored))]
        except (OSError, KeyError, SafetensorError):
            pass
        taps = self.encode(read_rgb(path))
        size = sum(tap.numel() * tap.element_size() for tap in taps)
        if size <= self.left_bytes:
            self._store(file, taps)
            self.left_bytes -= size
        return taps

    def needed_bytes(self, paths: Sequence[Path]) -> int:
        """What the features of these pictures would take on the disk beside what is there. Raises ImageError.

        All pictures take the same; the first of them that is missing is encoded for it.
        """
        missing = [path for path in paths if (file := self._file(path)) is not None and not file.exists()]
        if not missing:
            return 0
        return len(missing) * sum(tap.numel() * tap.element_size() for tap in self.encode(read_rgb(missing[0])))

    def forget(self, paths: Iterable[Path]) -> None:
        """Remove what is kept of these pictures. A run beside this one that shares it computes anew."""
        for path in paths:
            with contextlib.suppress(ImageError, OSError):  # the picture is gone, the disk may not be written any more
                if (file := self._file(path)) is not None:
                    file.unlink(missing_ok=True)
                    file.with_suffix(".partial").unlink(missing_ok=True)

    def _file(self, path: Path) -> Path | None:
        if self._folder is None:
            return None
        try:
            state = path.stat()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
        known = [*self._identity, str(path.resolve()), state.st_size, state.st_mtime_ns]
        return self._folder / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()}.safetensors"

    def _store(self, file: Path, taps: list[Tensor]) -> None:
        partial = file.with_suffix(".partial")
        try:
            save_file({str(number): tap.cpu().contiguous() for number, tap in enumerate(taps)}, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            self.left_bytes = 0
            log.warning("feature_cache_unwritable", folder=str(self._folder), error=str(error))
