"""A model bundle with random weights and a data set of drawn parts, for tests that need neither to be good."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import tomli_w
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from flawline.models.bundle import SamSettings
from flawline.models.sam import build_sam, own_state

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SAM = {
    "architecture": "lite0",
    "checkpoint": "sam.safetensors",
    "input_size": 128,
    "decoder": {"dim": 32, "mlp_dim": 64, "heads": 4, "iou_hidden": 32},
}


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Soft random patches, (H, W, 3) uint8: something for every place to differ in."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, height // 10 + 2, width // 10 + 2)).astype(np.float32))
    soft = functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0)
    return soft.numpy().astype(np.uint8)


def write_tiny_bundle(
    folder: Path,
    *,
    adapter: bool = True,
    region: float = 0.5,
    activation: str | None = None,
    config: dict[str, Any] = CLIP_CONFIG,
) -> Path:
    """The bundle `tiny` in `folder`: ViT CLIP of four blocks at 64 px, lite0 SAM at 128 px."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip.json").write_text(json.dumps(config))
    width, channels = config["embed_dim"], config["vision_cfg"]["width"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip = open_clip.CLIP(**config)
        save_file(
            {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, folder / "clip.safetensors"
        )
        settings = SamSettings.model_validate(SAM)
        save_file(own_state(build_sam(settings), settings), folder / "sam.safetensors")
        layers = {
            f"fc.{n}.{kind}": torch.randn(shape)
            for n in range(4)
            for kind, shape in (("weight", (width, channels)), ("bias", (width,)))
        }
        save_file(layers, folder / "adapter.safetensors")
    names = ["clip.json", "clip.safetensors", "sam.safetensors"] + ["adapter.safetensors"] * adapter
    clip_table = {"config": "clip.json", "checkpoint": "clip.safetensors", "input_size": 64, "taps": [1, 2, 3, 4]}
    manifest = {
        "schema": "flawline.bundle/1",
        "name": "tiny",
        "clip": clip_table | ({"activation": activation} if activation else {}),
        "sam": SAM,
        "thresholds": {"region": region, "decision": 0.5},
        "files": [
            {"name": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(), "licence": "CC0-1.0"}
            for name in names
        ],
    }
    if adapter:
        manifest["adapter"] = {"checkpoint": "adapter.safetensors", "temperature": 10.0}
    (folder / "bundle.toml").write_text(tomli_w.dumps(manifest))
    return folder


def write_parts(root: Path, name: str = "plate", *, good: int = 3, defective: int = 4, seed: int = 0) -> Path:
    """The set `name` in MVTec AD's layout: grey plates of two sizes, the defective ones with a dark spot."""
    rng = np.random.default_rng(seed)
    for number in range(good + defective):
        height, width = (70, 90) if number % 2 else (64, 64)
        picture = rng.integers(120, 150, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        if number >= good:
            y, x = rng.integers(5, height - 25), rng.integers(5, width - 25)
            mask[y : y + 16, x : x + 12] = 255
            picture[mask > 0] = (20, 30, 200)
        kind = "good" if number < good else "spot"
        file = root / name / "test" / kind / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
        if number >= good:
            target = root / name / "ground_truth" / kind / f"{number:03}_mask.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(target)
    return root / name
