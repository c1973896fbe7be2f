"""The embedded bundle's folder: its weights in half precision, and bundle.toml with their hashes and licences."""

from pathlib import Path
from typing import Any

import tomli_w
from safetensors.torch import save_file

from flawline.models.bundle import DecoderSettings, SamSettings, file_sha256
from flawline.models.checkpoints import StateDict
from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.sam import own_state
from flawline.models.training.train_clip import LITE0_MEAN, LITE0_STD, TEMPERATURE

SAM_SETTINGS = SamSettings(
    architecture="lite0",
    checkpoint="sam.safetensors",
    input_size=512,
    trunk_from_clip=True,
    own_stages=5,  # down to stride 16
    decoder=DecoderSettings(dim=128, depth=2, heads=8, mlp_dim=512, mask_channels=16, iou_depth=3, iou_hidden=128),
)


def half(state: StateDict) -> StateDict:
    """Weights as they are stored: half precision."""
    return {name: value.half().contiguous() if value.is_floating_point() else value for name, value in state.items()}


def write_bundle(
    bundle: Path,
    clip_config: Path,
    clip: DenseClip,
    adapter: AdapterLocaliser,
    sam: Any,
    thresholds: dict[str, float],
    input_size: int,
    photographs: bool,
) -> None:
    """The bundle's folder: weights in half precision, bundle.toml with every file's hash.

    `input_size`: edge of CLIP's frame, px. `photographs`: whether it was trained on parts made of some.
    """
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "clip.json").write_bytes(clip_config.read_bytes())
    save_file(half(clip.model.state_dict()), bundle / "clip.safetensors")
    save_file(
        {name: value.contiguous() for name, value in adapter.state_dict().items()}, bundle / "adapter.safetensors"
    )
    save_file(half(own_state(sam, SAM_SETTINGS)), bundle / "sam.safetensors")
    shown = "drawn pictures" + " of photographed materials too" * photographs
    trunk = "trunk fine-tuned from Google's EfficientNet-Lite0 (Apache-2.0)"
    sources = {
        "clip.json": ("Apache-2.0", None),
        "clip.safetensors": (
            "Apache-2.0",
            f"{trunk}; token table from all-MiniLM-L6-v2 (Apache-2.0); the rest trained on {shown}",
        ),
        "adapter.safetensors": ("Apache-2.0", f"trained on {shown}"),
        "sam.safetensors": ("Apache-2.0", f"{trunk}; segment_anything's modules; trained on {shown}"),
    }
    files = [
        {"name": name, "sha256": file_sha256(bundle / name), "licence": licence}
        | ({"source": source} if source else {})
        for name, (licence, source) in sources.items()
    ]
    manifest = {
        "schema": "flawline.bundle/1",
        "name": "demo",
        "description": f"small CLIP and small SAM on EfficientNet-Lite0, trained on {shown}",
        "clip": {
            "config": "clip.json",
            "checkpoint": "clip.safetensors",
            "input_size": input_size,
            "taps": [0, 1, 2],
            "mean": [LITE0_MEAN] * 3,
            "std": [LITE0_STD] * 3,
        },
        "adapter": {"checkpoint": "adapter.safetensors", "temperature": TEMPERATURE},
        "sam": SAM_SETTINGS.model_dump(exclude_none=True),
        "thresholds": thresholds,
        "precision": "fp16",  # bf16 has three bits less and moves the map's steep edges (docs/prompts.md)
        "files": files,
    }
    (bundle / "bundle.toml").write_text(tomli_w.dumps(manifest))
