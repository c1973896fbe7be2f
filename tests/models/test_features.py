"""Other encoders of F: they load published weights from a folder, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision

from flawline.config.errors import BundleError, ConfigError
from flawline.config.recipe import PromptSettings
from flawline.models.features import FeatureEncoder
from flawline.models.frames import FrameGeometry
from flawline.models.prompt import point_prompts

GEOMETRY = FrameGeometry(60, 80, 40, 128)


def published(library: str, model: str, folder: Path) -> Any:
    """A model with random weights, and its state where published weights would lie."""
    torch.manual_seed(1)
    source = timm.create_model(model) if library == "timm" else torchvision.models.get_model(model, weights=None)
    torch.save(source.state_dict(), folder / f"{model}.pth")
    return source.eval()


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("timm:resnet10t", 8),
        ("timm:vit_small_patch14_dinov2", 9),
        ("torchvision:mobilenet_v3_small", 8),
    ],
)
def test_features_cover_sams_padded_frame(name: str, grid: int, tmp_path: Path) -> None:
    library, model = name.split(":")
    published(library, model, tmp_path)
    encoder = FeatureEncoder(name, 128, [tmp_path / "none", tmp_path])
    fitted = torch.randint(0, 255, (2, 3, 96, 128)).float()
    with torch.no_grad():
        features = encoder(fitted)
        assert features.shape[0] == 2
        assert abs(features.shape[-1] - grid) <= 1
        assert features.shape[-2] == features.shape[-1]
        anomaly = torch.zeros(2, 40, 40)
        anomaly[:, 10:15, 20:25] = 1.0
        made = point_prompts(anomaly, anomaly > 0.5, features, GEOMETRY, PromptSettings())
    assert made.present[:, 3].all()


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18"])
def test_the_weights_are_used(name: str, tmp_path: Path) -> None:
    source = published(*name.split(":"), tmp_path)
    encoder = FeatureEncoder(name, 128, [tmp_path])
    fitted = torch.randint(0, 255, (1, 3, 128, 128)).float()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (fitted / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        activation = source.act1 if name.startswith("timm") else source.relu
        stem = source.maxpool(activation(source.bn1(source.conv1(image))))
        expected = source.layer3(source.layer2(source.layer1(stem)))
        torch.testing.assert_close(encoder(fitted), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "must be `sam`"),
        ("timm:nothing_of_the_kind", "no model of this name"),
        ("torchvision:nothing_of_the_kind", "no model of this name"),
        ("timm:resnet10t", r"no weights; put resnet10t\.safetensors"),
    ],
)
def test_what_cannot_be_had_is_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        FeatureEncoder(name, 128, [tmp_path])


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18"])
def test_weights_of_another_model_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = name.split(":")[1]
    torch.save({"something.weight": torch.zeros(3)}, tmp_path / f"{model}.pth")
    with pytest.raises(BundleError, match=rf"{model}\.pth"):
        FeatureEncoder(name, 128, [tmp_path])
