"""Parts that shift: how far is found from features, and a memory then compares places on the part, not in the frame."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from flawline.config.errors import ConfigError
from flawline.config.recipe import Recipe
from flawline.models.inspector import Inspector
from flawline.models.memory import STRIKING, Memory
from flawline.models.memory_file import read_memory, write_memory
from flawline.models.memory_learn import PLACE, Learner
from flawline.models.registration import Registration


def scene(down: float, right: float, seed: int = 0) -> Tensor:
    """(32, 24, 24): features of a part of 12 x 12 cells on an even ground, a little noise over all."""
    generator = torch.Generator().manual_seed(3)
    part = functional.interpolate(torch.randn(1, 32, 6, 6, generator=generator), (12, 12), mode="bicubic")
    ground = torch.randn(1, 32, 1, 1, generator=generator).expand(1, 32, 24, 24).clone()
    ground[..., 6:18, 6:18] = part
    moved = torch.tensor([[[1.0, 0.0, -2 * right / 24], [0.0, 1.0, -2 * down / 24]]])
    grid = functional.affine_grid(moved, [1, 32, 24, 24], align_corners=False)
    seen = functional.grid_sample(ground, grid, padding_mode="border", align_corners=False)[0]
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(seen + 0.2 * noise, dim=0)


def test_how_far_a_part_has_shifted_is_found() -> None:
    registration = Registration.of(scene(0.0, 0.0))
    wanted = torch.tensor([[0.0, 0.0], [3.0, -2.0], [-5.0, 5.0], [1.5, 0.0], [0.4, -3.6]])
    seen = torch.stack([scene(down, right, seed=9 + n) for n, (down, right) in enumerate(wanted.tolist())])
    assert (registration.shifts(seen) - wanted).abs().max() < 0.2


def test_a_part_that_lies_still_is_not_moved() -> None:
    registration = Registration.of(scene(0.0, 0.0))
    still = torch.stack([scene(0.0, 0.0, seed=20 + n) for n in range(8)])
    assert registration.shifts(still).abs().max() < 0.1
    nothing = torch.ones(1, 32, 24, 24) / 32**0.5
    assert torch.equal(registration.shifts(nothing), torch.zeros(1, 2))


def part(number: int, right: int, label: int = 40) -> NDArray[np.uint8]:
    """A dark plate with a bright edge and a label `label` px from it, `right` px from the frame's middle."""
    picture = np.random.default_rng(number).normal(200, 4, (384, 384, 3))
    left = 92 + right
    picture[90:294, left : left + 200] = 60 + np.random.default_rng(number + 500).normal(0, 4, (204, 200, 3))
    picture[90:294, left : left + 18] = 240
    picture[150:200, left + label : left + label + 50] = (220, 30, 30)
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    return Inspector.load("demo", device="cpu")


def learnt(inspector: Inspector, registered: bool) -> Memory:
    learner = Learner(inspector, "plates", Recipe(memory_registration=registered, memory_share=1.0))
    for number, right in enumerate((-72, -48, -24, 0, 24, 48, 72, -60, 12, 60)):
        learner.add(part(number, right), f"{number}.png")
    return learner.learn().memory


def highest(inspector: Inspector, memory: Memory, picture: NDArray[np.uint8]) -> float:
    """On the scale on which the most striking place of a good part is 1."""
    encoded = inspector.encode([picture])
    far = float(memory.distances(memory.cells(inspector.levels(encoded)), encoded.tiles).max())
    return (far - memory.about.ordinary) / (memory.about.striking - memory.about.ordinary)


def test_a_label_in_the_wrong_place_is_found_on_parts_that_shift(inspector: Inspector, tmp_path: Path) -> None:
    plain, laid_over = learnt(inspector, False), learnt(inspector, True)
    assert (plain.about.place, plain.registration) == (0.0, None)
    assert laid_over.about.place == PLACE
    good = [part(100 + n, right) for n, right in enumerate((-66, -36, 6, 36, 66))]
    wrong = [part(200 + n, right, label=120) for n, right in enumerate((-66, -36, 6, 36, 66))]
    assert max(highest(inspector, laid_over, picture) for picture in good) < STRIKING
    assert min(highest(inspector, laid_over, picture) for picture in wrong) > 1.5 * STRIKING
    write_memory(tmp_path / "m", laid_over)
    again = read_memory(tmp_path / "m")
    assert again.sha256 == laid_over.sha256
    assert highest(inspector, again, good[1]) == pytest.approx(highest(inspector, laid_over, good[1]), abs=1e-3)
    with pytest.raises(ConfigError, match="was learnt with other memory_registration"):
        inspector.prepare(Recipe(memory=str(tmp_path / "m")))


def test_tiles_are_not_laid_over_one_another() -> None:
    with pytest.raises(ValidationError, match=r"tiling\.enabled must be false"):
        Recipe.model_validate({"memory_registration": True, "tiling": {"enabled": True}})
