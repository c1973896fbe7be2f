"""The plain pipeline that `flawline bench` is measured against.

It is what a reader of the two libraries' documentation would write: open_clip's forward of the picture,
`SamPredictor.set_image`, and three `predict`s, each fed by the one before. It gets its points for nothing and makes no
map, no fusion and no decision, so the ratio is rather too small than too large.
"""

import itertools
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything import SamPredictor

from flawline.models.towers import Towers

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the whole, and its stages."""

    whole: float
    stages: dict[str, float]


class PlainPipeline:
    """One picture at a time, in float32; with `autocast`, in what torch makes of that precision.

    `towers` are in float32 and have segment_anything's own attention.
    """

    def __init__(self, towers: Towers, autocast: torch.dtype | None = None) -> None:
        self._clip = towers.clip
        self._device = towers.device
        self._autocast = autocast
        self._predictor = SamPredictor(towers.sam)

    @torch.no_grad()
    def __call__(self, picture: Picture, points: NDArray[np.float32], labels: NDArray[np.int64]) -> Timing:
        """One picture, (H, W, 3) uint8 RGB; points (n, 2) x, y and labels (n,) as `SamPredictor` takes them."""
        with self._precision():
            clock = [time.perf_counter()]
            size = self._clip.input_size
            squashed = np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))
            tensor = torch.from_numpy(squashed).permute(2, 0, 1).unsqueeze(0).to(self._device)
            self._clip.model.encode_image(self._clip.normalise(tensor)).cpu()
            clock.append(time.perf_counter())
            self._predictor.set_image(picture)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            clock.append(time.perf_counter())
            extra: dict[str, Any] = {}
            for level in range(3):
                masks, scores, logits = self._predict(points, labels, extra)
                best = int(scores.argmax())
                extra = {"mask_input": logits[best : best + 1]}
                y, x = np.nonzero(masks[best])
                if level == 1 and len(x):
                    extra["box"] = np.array([x.min(), y.min(), x.max(), y.max()], np.float32)
            clock.append(time.perf_counter())
        laps = [(after - before) * 1000.0 for before, after in itertools.pairwise(clock)]
        return Timing(sum(laps), dict(zip(("clip", "encode", "cascade"), laps, strict=True)))

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast)

    def _predict(self, points: NDArray[np.float32], labels: NDArray[np.int64], extra: dict[str, Any]) -> Any:
        """Masks (3, H, W), scores (3,) and logits (3, h, w) of one `predict`."""
        predictor = self._predictor
        if self._autocast is None:
            return predictor.predict(points, labels, multimask_output=True, **extra)
        # NumPy has no bfloat16: the same steps as `predict`'s, and the results in float32
        shape = predictor.original_size
        coordinates = predictor.transform.apply_coords(points, shape)
        box = extra.get("box")
        placed = None if box is None else predictor.transform.apply_boxes(box, shape)
        mask = extra.get("mask_input")

        def send(values: Any, kind: torch.dtype = torch.float32) -> torch.Tensor | None:
            return None if values is None else torch.as_tensor(values, dtype=kind, device=self._device)

        sent_coordinates, sent_labels = send(coordinates), send(labels, torch.int)
        assert sent_coordinates is not None
        assert sent_labels is not None
        masks, scores, logits = predictor.predict_torch(
            sent_coordinates[None],
            sent_labels[None],
            send(placed),
            None if mask is None else send(mask[None]),
            multimask_output=True,
        )
        return masks[0].cpu().numpy(), scores[0].float().cpu().numpy(), logits[0].float().cpu().numpy()
