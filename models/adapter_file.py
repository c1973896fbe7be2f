"""Another adapter than the bundle's own, from a file that `flawline train-adapter` or APRIL-GAN wrote."""

from dataclasses import replace
from pathlib import Path

from flawline.models.checkpoints import load_weights, read_state_dict
from flawline.models.localise import AdapterLocaliser
from flawline.models.towers import Towers, require_activation


def with_adapter(towers: Towers, path: Path) -> Towers:
    """The same towers with the linear layers of `path`. Raises BundleError naming the file."""
    settings = towers.bundle.manifest.adapter
    adapter = AdapterLocaliser(
        towers.clip.tap_channels(),
        towers.clip.embed_dim,
        settings.temperature if settings else 100.0,
        settings.centred if settings else False,
    )
    require_activation(path, towers.clip)
    load_weights(adapter, {name: tensor.float() for name, tensor in read_state_dict(path).items()}, path)
    return replace(towers, adapter=adapter.to(towers.device).eval().requires_grad_(False))
