"""The training-free localiser against a slow one that was written from the description of WinCLIP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from flawline.config.errors import BundleError
from flawline.models.bundle import ClipSettings
from flawline.models.clip import DenseClip
from flawline.models.localise import WindowLocaliser

TEMPERATURE = 0.07
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 40, "layers": 3, "width": 32, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}

pytestmark = pytest.mark.usefixtures("no_gradients")


def small_clip(folder: Path, size: int = 40, patch: int = 8) -> DenseClip:
    config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"patch_size": patch}}
    (folder / "clip.json").write_text(json.dumps(config))
    clip = DenseClip(
        ClipSettings.model_validate({"config": "clip.json", "checkpoint": "x", "input_size": size}), folder
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in clip.model.visual.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1.0 + 0.1 * noise if name.endswith(("ln_1.weight", "ln_2.weight")) else 0.2 * noise)
    return clip


def texts() -> NDArray[np.float32]:
    pair = np.random.default_rng(2).normal(size=(24, 2))
    return (pair / np.linalg.norm(pair, axis=0)).astype(np.float32)


def judged(visual: Any, tokens: torch.Tensor, text: NDArray[np.float32]) -> float:
    """P(abnormal) of one sequence of embedded tokens, class token first."""
    x = visual.ln_pre(tokens[None])
    for block in visual.transformer.resblocks:
        x = block(x)
    feature = (visual.ln_post(x[0, 0]) @ visual.proj).numpy().astype(float)
    normal, abnormal = np.exp(feature / np.linalg.norm(feature) @ text.astype(float) / TEMPERATURE)
    return float(abnormal / (normal + abnormal))


def slow_window_map(clip: DenseClip, image: torch.Tensor, text: NDArray[np.float32]) -> NDArray[np.float64]:
    """(3, S, S) -> (h, w): one window after the other, one patch after the other."""
    visual = clip.model.visual
    patches = functional.conv2d(image[None], visual.conv1.weight, stride=8)[0]  # (C, h, w)
    _, height, width = patches.shape
    positions = visual.positional_embedding
    first = visual.class_embedding + positions[0]
    tokens = {(y, x): patches[:, y, x] + positions[1 + y * width + x] for y in range(height) for x in range(width)}
    whole = judged(visual, torch.stack([first, *tokens.values()]), text)
    scales = []
    for scale in (2, 3):
        scores: dict[tuple[int, int], list[float]] = {place: [] for place in tokens}
        for top in range(height - scale + 1):
            for left in range(width - scale + 1):
                members = [(top + dy, left + dx) for dy in range(scale) for dx in range(scale)]
                score = judged(visual, torch.stack([first, *(tokens[place] for place in members)]), text)
                for place in members:
                    scores[place].append(score)
        harmonic = [len(each) / sum(1.0 / score for score in each) for each in scores.values()]
        scales.append(np.array(harmonic).reshape(height, width))
    result: NDArray[np.float64] = 3.0 / (1.0 / scales[0] + 1.0 / scales[1] + 1.0 / whole)
    return result


@pytest.mark.parametrize("at_once", [256, 5])
def test_windows_say_what_a_slow_reading_of_winclip_says(tmp_path: Path, at_once: int) -> None:
    clip, text = small_clip(tmp_path), texts()
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    found = WindowLocaliser(clip, at_once)(images, torch.from_numpy(text), 40)
    assert found.shape == (2, 40, 40)
    for image, plane in zip(images, found, strict=True):
        coarse = torch.from_numpy(slow_window_map(clip, image, text)).float()
        expected = functional.interpolate(coarse[None, None], (40, 40), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(plane, expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 1e-3


def test_a_text_that_is_surely_normal_gives_zero_and_not_a_nan(tmp_path: Path) -> None:
    clip = small_clip(tmp_path)
    image = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(4))
    feature = functional.normalize(clip.model.encode_image(image)[0], dim=0)
    text = torch.stack([feature, -feature], dim=1) * 100.0
    plane = WindowLocaliser(clip)(image, text, 40)
    assert plane.isfinite().all()
    assert plane.min() >= 0.0
    assert plane.max() < 1e-3


def test_towers_without_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="3 x 3"):
        WindowLocaliser(small_clip(tmp_path, 32, 16))
    settings = ClipSettings.model_validate({"architecture": "RN50", "checkpoint": "x", "input_size": 64})
    with torch.device("meta"):
        convolutions = DenseClip(settings, tmp_path)
    with pytest.raises(BundleError, match="ViT image tower"):
        WindowLocaliser(convolutions)
