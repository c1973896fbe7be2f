"""Half precision by `Inspector.load(precision=...)`: it is really used, and the map hardly moves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_passes import SUSPICIOUS, picture
from tiny_bundle import write_tiny_bundle

from flawline.models.inspector import Inspector

torch.set_num_threads(1)
LARGEST = {"bf16": 0.08, "fp16": 0.01}
"""Difference of a map in [0, 1] from that of fp32; bf16 has three bits less of mantissa than fp16."""


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_moves_the_map_a_little(tmp_path: Path, precision: str) -> None:
    folder = write_tiny_bundle(tmp_path / "tiny")
    full, half = (Inspector.load(folder, "cpu", name) for name in ("fp32", precision))
    weights = [
        next(tower.parameters()).dtype for tower in (half.towers.clip.model.visual, half.towers.sam.image_encoder)
    ]
    assert weights == [half.towers.dtype] * 2
    assert half.towers.dtype.itemsize == 2
    for seed in range(3):
        image = picture(96, 120, seed)
        exact, near = full.inspect(image, SUSPICIOUS), half.inspect(image, SUSPICIOUS)
        assert exact.refined
        assert near.refined
        difference = np.abs(exact.anomaly_map - near.anomaly_map)
        assert 0.0 < difference.max() < LARGEST[precision]
        assert abs(exact.score - near.score) < LARGEST[precision]
