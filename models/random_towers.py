"""CLIP and SAM of published sizes with random weights: how fast they are can be measured without any file.

Times do not depend on the values of weights; what such models find is meaningless.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from flawline.models.bundle import SCHEMA, Bundle, Manifest
from flawline.models.checkpoints import Undrawn
from flawline.models.clip import DenseClip
from flawline.models.localise import AdapterLocaliser
from flawline.models.sam import build_sam
from flawline.models.switches import Switches
from flawline.models.towers import Towers, assemble, choose_device, choose_precision

CLIP = "ViT-L-14-336"
CLIP_INPUT = 518
NAMES = ("vit_h", "vit_l", "vit_b", "vit_t")
_NOISE = 1 << 20


def random_bundle(sam: str = "vit_h", sam_input: int = 1024, clip: str = CLIP, clip_input: int = CLIP_INPUT) -> Bundle:
    """A bundle of no folder that describes these models; two sentences are its words."""
    names = ("clip", "adapter", "sam")
    tree = {
        "schema": SCHEMA,
        "name": f"random-{sam}-{sam_input}",
        "clip": {"architecture": clip, "checkpoint": "clip", "input_size": clip_input},
        "adapter": {"checkpoint": "adapter", "temperature": 10.0},
        "sam": {"architecture": sam, "checkpoint": "sam", "input_size": sam_input},
        "prompts": {"states_normal": ["flawless {}"], "states_abnormal": ["damaged {}"], "templates": ["{}"]},
        "files": [
            {"name": name, "sha256": hashlib.sha256(f"random {clip} {name}".encode()).hexdigest(), "licence": "none"}
            for name in names
        ],
    }
    return Bundle(Path("random"), Manifest.model_validate(tree), hashlib.sha256(str(tree).encode()).hexdigest())


@torch.no_grad()
def random_towers(
    bundle: Bundle, device: str = "auto", precision: str = "auto", switches: Switches | None = None
) -> Towers:
    """The models of `random_bundle`, the same ones every time. Raises ConfigError."""
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen)
    manifest = bundle.manifest
    with torch.random.fork_rng(devices=[]), Undrawn():
        torch.manual_seed(0)  # of what is drawn otherwise than in place
        clip = DenseClip(manifest.clip, bundle.folder)
        sam = build_sam(manifest.sam)
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))
    for module in (clip, sam):
        fill(module, noise)
    assert manifest.adapter is not None
    with Undrawn():
        adapter = AdapterLocaliser(
            clip.tap_channels(), clip.embed_dim, manifest.adapter.temperature, manifest.adapter.centred
        )
    fill(adapter, noise)
    adapter.eval().requires_grad_(False)
    return assemble(
        bundle, clip, sam, adapter, chosen, dtype, Switches.from_environment() if switches is None else switches
    )


def fill(module: nn.Module, noise: Tensor) -> None:
    """Every parameter from one block of noise, scaled so that activations keep their size; norms stay about one."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        count = parameter.numel()
        values = noise.roll(number).repeat(-(-count // len(noise)))[:count].view(parameter.shape)
        scale = 0.02 if parameter.dim() < 2 else (count / parameter.shape[0]) ** -0.5
        norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.copy_(values * scale + (1.0 if norm else 0.0))
