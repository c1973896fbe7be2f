"""Published sizes at full size, random weights: one frame goes through ViT-L-14-336 at 518 px and SAM ViT-B.

That ViT-H and ViT-L are built as segment_anything has them, test_checkpoints.py shows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from segment_anything import sam_model_registry
from torch import Tensor

from flawline.config.recipe import Recipe
from flawline.models.fetch_bundle import FetchPlan, fetch_bundle
from flawline.models.inspector import Inspector
from flawline.models.known_bundles import KNOWN, PublishedFile


def drawn(names: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A value in half precision for every name, none zero; one long block of noise serves all, which is quicker."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 << 20, generator=generator)
    state = {}
    for name, meta in names.items():
        count = meta.numel()
        values = noise.roll(len(state)).repeat(-(-count // len(noise)))[:count].view(meta.shape)
        scale = 0.02 if meta.dim() < 2 else (meta.numel() / meta.shape[0]) ** -0.5
        state[name] = (values * scale + (1.0 if "norm" in name or "ln_" in name else 0.0)).half()
    return state


def write(path: Path, state: dict[str, Tensor]) -> PublishedFile:
    torch.save(state, path)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return PublishedFile(path.name, "http://127.0.0.1:1/none", digest, path.stat().st_size, "random")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_frame_goes_through_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "vit-b"
    folder.mkdir()
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14-336"))
        sam = sam_model_registry["vit_b"](checkpoint=None)
    known = replace(
        KNOWN["vit-b"],
        clip=write(folder / KNOWN["vit-b"].clip.name, drawn(clip.state_dict(), 1)),
        sam=write(folder / KNOWN["vit-b"].sam.name, drawn(sam.state_dict(), 2)),
    )
    generator = torch.Generator().manual_seed(3)
    layers = {f"fc.{n}.weight": torch.randn(768, 1024, generator=generator) for n in range(4)}
    layers |= {f"fc.{n}.bias": torch.randn(768, generator=generator) for n in range(4)}
    torch.save({"trainable_linearlayer": layers}, tmp_path / "mvtec_pretrained.pth")
    plan = FetchPlan(known, tmp_path, adapter=tmp_path / "mvtec_pretrained.pth")
    bundle = fetch_bundle(plan, lambda *_: None)

    recipe = Recipe.model_validate(
        {
            "states_normal": ("flawless {}",),
            "states_abnormal": ("damaged {}",),
            "prompt": {"region": "top_percent", "region_percent": 1.0},
        }
    )
    inspector = Inspector.load(bundle.folder, device="cpu", recipe=recipe)
    assert inspector.towers.clip.indices == [5, 11, 17, 23]
    image = np.random.default_rng(4).integers(0, 256, (350, 500, 3), np.uint8)
    trace = inspector.trace(image)
    assert trace.clip_map.shape == (518, 518)
    assert np.isfinite(trace.clip_map).all()
    assert trace.clip_map.std() > 0.0
    assert trace.sam_embedding is not None
    assert trace.sam_embedding.shape == (256, 64, 64)
    assert [stage.logits.shape for stage in trace.stages] == [(256, 256)] * 3
    assert all(np.isfinite(stage.logits).all() for stage in trace.stages)
    assert (trace.labels == 1).sum() == 3
    assert trace.result.anomaly_map.shape == (350, 500)
    assert trace.result.refined
