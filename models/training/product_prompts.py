"""Prompts of SAM's training that are the product's own: CLIP's map through PPG."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flawline.config.recipe import PromptSettings
from flawline.models.clip import DenseClip
from flawline.models.frames import FrameGeometry
from flawline.models.localise import AdapterLocaliser
from flawline.models.prompt import point_prompts, region
from flawline.models.training.pictures import Pictures
from flawline.models.training.validate import clip_maps


class ProductPrompts:
    """Point prompts as the product makes them, kept for each picture after the first time.

    The features of the negative points are the neck's while it is being trained: those of the first asking.
    """

    def __init__(
        self,
        clip: DenseClip,
        adapter: AdapterLocaliser,
        text: Tensor,
        sam: Any,
        pictures: Pictures,
        threshold: float,
    ) -> None:
        self._clip, self._adapter, self._text, self._sam = clip, adapter, text, sam
        self._pictures, self._threshold = pictures, threshold
        self._known: dict[int, tuple[Tensor, Tensor, Tensor] | None] = {}
        self._settings = PromptSettings()

    @torch.no_grad()
    def __call__(self, row: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(6, 2) x, y, (6,) labels, (6,) present; None where CLIP sees nothing."""
        if row not in self._known:
            self._known[row] = self._make(np.asarray(self._pictures.image[row]))
        return self._known[row]

    def _make(self, image: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[Tensor, Tensor, Tensor] | None:
        size = self._clip.input_size
        anomaly_map = torch.from_numpy(clip_maps(self._clip, self._adapter, image[None], [self._text], size))
        found = region(anomaly_map, self._settings, self._threshold)
        if not bool(found.any()):
            return None
        pixels = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).float()
        embedding = self._sam.image_encoder(self._sam.preprocess(pixels))
        geometry = FrameGeometry(image.shape[0], image.shape[1], size, self._sam.image_encoder.img_size)
        prompts = point_prompts(anomaly_map, found, embedding, geometry, self._settings)
        return geometry.image_to_sam(prompts.points[0]), prompts.labels[0], prompts.present[0]
