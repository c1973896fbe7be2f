"""The memory of good parts: what it holds, what it refuses, how it scales and joins the zero-shot map."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_bundle import write_tiny_bundle

from flawline.config.errors import ConfigError, ImageError
from flawline.config.recipe import PromptSettings, Recipe
from flawline.models.coreset import OWN_SCALE, coreset, outliers
from flawline.models.descriptors import MOST_CHANNELS, projection
from flawline.models.inspector import Inspector
from flawline.models.memory import LEAST_SPREAD, logit, nearest
from flawline.models.memory_file import read_memory, write_memory
from flawline.models.memory_learn import Learner, Learnt, turn
from flawline.models.memory_teach import teach
from flawline.models.pyramid import MEMORY_LEVELS, Lite0Pyramid


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector.load(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", region=0.5), device="cpu")


def good_part(number: int) -> NDArray[np.uint8]:
    """A grey plate with a bright bar, its noise its own."""
    picture = np.random.default_rng(number).normal(120, 6, (64, 64, 3))
    picture[20:44, 28:36] += 80
    return picture.clip(0, 255).astype(np.uint8)


def bad_part(number: int) -> NDArray[np.uint8]:
    picture = good_part(number)
    picture[8:24, 44:60] = (255, 0, 0)
    return picture


def learnt(inspector: Inspector, pictures: list[NDArray[np.uint8]], recipe: Recipe | None = None) -> Learnt:
    learner = Learner(inspector, "plates", recipe or Recipe())
    for number, picture in enumerate(pictures):
        learner.add(picture, f"{number}.png")
    return learner.learn()


def test_the_same_pictures_in_any_order_give_the_same_memory(inspector: Inspector) -> None:
    pictures = [good_part(number) for number in range(5)]
    first, second = learnt(inspector, pictures).memory, learnt(inspector, pictures[::-1]).memory
    other = learnt(inspector, [*pictures[:4], good_part(9)]).memory
    assert first.sha256 == second.sha256
    assert first.sha256 != other.sha256


def test_a_file_gives_the_memory_back(inspector: Inspector, tmp_path: Path) -> None:
    memory = learnt(inspector, [good_part(0), good_part(1)]).memory
    write_memory(tmp_path / "m.safetensors", memory)
    again = read_memory(tmp_path / "m.safetensors")
    assert again.sha256 == memory.sha256
    assert again.about == memory.about
    assert torch.equal(again.bank, memory.bank)


def test_damage_to_the_file_is_noticed(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_memory(path, learnt(inspector, [good_part(0), good_part(1)]).memory)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"m\.safetensors.*damaged"):
        read_memory(path)
    path.write_bytes(b"no memory")
    with pytest.raises(ConfigError, match=r"m\.safetensors"):
        read_memory(path)
    with pytest.raises(ConfigError, match=r"gone\.safetensors"):
        read_memory(tmp_path / "gone.safetensors")


def test_a_memory_of_another_bundle_or_of_other_words_is_refused(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_memory(path, learnt(inspector, [good_part(0), good_part(1)]).memory)
    other = Inspector.load(write_tiny_bundle(tmp_path / "other", region=0.4), device="cpu")
    with pytest.raises(ConfigError, match=r"m\.safetensors: was learnt with bundle"):
        other.prepare(Recipe(memory=str(path)))
    with pytest.raises(ConfigError, match=r"m\.safetensors: was learnt with other words"):
        inspector.prepare(Recipe(object="gear", memory=str(path)))
    with pytest.raises(ConfigError, match=r"m\.safetensors: was learnt with other roi"):
        inspector.prepare(Recipe(roi=(0, 0, 32, 32), memory=str(path)))


def test_a_defect_stands_out_from_the_memory_and_a_good_part_does_not(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    memory = learnt(inspector, [good_part(number) for number in range(6)]).memory
    write_memory(path, memory)
    recipe = Recipe(memory=str(path), min_defect_area_px=4)
    bad, good = inspector.trace(bad_part(20), recipe), inspector.trace(good_part(21), recipe)
    spot = np.zeros((64, 64), bool)
    spot[8:24, 44:60] = True
    assert bad.clip_map[spot].mean() > 3 * bad.clip_map[~spot].mean()
    assert bad.clip_map.max() > 0.9
    assert good.clip_map.max() < 0.5
    assert good.stages == []  # the clean frame's gate goes by the fused map


def test_a_frame_of_another_size_is_refused(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_memory(path, learnt(inspector, [good_part(0), good_part(1)]).memory)
    with pytest.raises(ImageError, match="64 x 64"):
        inspector.inspect(np.zeros((50, 64, 3), np.uint8), Recipe(memory=str(path)))


def test_a_frame_unlike_everything_is_said(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_memory(path, learnt(inspector, [good_part(number) for number in range(6)]).memory)
    recipe = Recipe(memory=str(path))
    assert inspector.inspect(good_part(30), recipe).warning is None
    moved = 255 - good_part(30)
    warning = inspector.inspect(moved, recipe).warning
    assert warning is not None
    assert "unlike" in warning
    assert inspector.inspect(moved, Recipe()).warning is None


def test_a_defective_part_among_the_good_ones_is_shown_and_left_out(inspector: Inspector) -> None:
    pictures = [good_part(number) for number in range(8)]
    with_outlier = learnt(inspector, [*pictures[:3], bad_part(40), *pictures[3:]])
    assert [shown.name for shown in with_outlier.pictures if shown.use == "outlier"] == ["3.png"]
    assert with_outlier.memory.about.outliers == 1
    assert torch.equal(with_outlier.memory.bank, learnt(inspector, pictures).memory.bank)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        ([1.0, 1.1, 0.9, 1.0, 3.0], [False, False, False, False, True]),
        ([1.0, 1.1, 0.9, 1.0, 1.15], [False] * 5),
        ([1.0, 1.0, 1.0, 5.0], [False] * 4),  # too few to tell
    ],
)
def test_the_rule_for_outliers(largest: list[float], expected: list[bool]) -> None:
    assert outliers(np.array(largest)).tolist() == expected


def test_duplicates_count_once_and_sizes_must_agree(inspector: Inspector) -> None:
    twice = learnt(inspector, [good_part(0), good_part(1), good_part(0)])
    assert [shown.use for shown in twice.pictures] == ["learnt", "learnt", "duplicate"]
    assert twice.memory.about.pictures == 2
    learner = Learner(inspector, "plates", Recipe())
    with pytest.raises(ConfigError, match="at least one"):
        learner.learn()
    learner.add(good_part(0), "first.png")
    with pytest.raises(ImageError, match=r"small\.png"):
        learner.add(np.zeros((32, 64, 3), np.uint8), "small.png")
    with pytest.raises(ImageError, match=r"deep\.png"):
        learner.add(np.zeros((64, 64, 3), np.uint16), "deep.png")  # type: ignore[arg-type]


def test_the_scale_is_that_of_each_good_part_against_the_others(inspector: Inspector) -> None:
    pictures = [good_part(number) for number in range(4)]
    result = learnt(inspector, pictures)
    largest = []
    for number, picture in enumerate(pictures):
        others = learnt(inspector, pictures[:number] + pictures[number + 1 :]).memory
        others = replace(others, about=others.about.model_copy(update={"place": result.memory.about.place}))
        encoded = inspector.encode([picture])
        largest.append(float(others.distances(others.cells(inspector.levels(encoded)), encoded.tiles).max()))
    assert result.memory.about.place == others.about.place
    expected = float(np.median([*largest, OWN_SCALE.striking]))
    assert result.memory.about.striking == pytest.approx(expected, rel=0.02)


def test_what_is_ignored_is_not_learnt(inspector: Inspector) -> None:
    marked = [good_part(number) for number in range(6)]
    for number, picture in enumerate(marked):  # a serial number: different on every part
        picture[:16, 40:] = np.random.default_rng(100 + number).integers(0, 255, (16, 24, 3))
    with_box = learnt(inspector, marked, Recipe(ignore=((40, 0, 24, 16),))).memory
    without = learnt(inspector, marked).memory
    assert with_box.about.striking < without.about.striking
    assert len(with_box.bank) == 6 * (64 - 2 * 3)


def test_one_picture_is_enough(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    memory = learnt(inspector, [good_part(0)]).memory
    write_memory(path, memory)
    recipe = Recipe(memory=str(path))
    assert memory.about.striking > memory.about.ordinary > 0
    bad, good = (inspector.inspect(picture, recipe) for picture in (bad_part(50), good_part(51)))
    assert bad.anomaly_map.max() > good.anomaly_map.max()


def test_the_fused_map_rises_with_either_part(inspector: Inspector) -> None:
    memory = learnt(inspector, [good_part(number) for number in range(3)]).memory
    words = torch.linspace(0.0, 1.0, 8).view(8, 1, 1).expand(8, 8, 8)
    far = torch.linspace(0.0, 2.0, 8).view(8, 1, 1).expand(8, 8, 8)
    by_words = memory.fuse(words, torch.full((8, 8, 8), memory.about.striking), 0.5, 0.6)[:, 4, 4]
    by_memory = memory.fuse(torch.full((8, 8, 8), 0.5), far, 0.5, 0.6)[:, 4, 4]
    assert bool((by_words.diff() >= 0).all())
    assert bool((by_memory.diff() >= 0).all())
    assert by_words[-1] > by_words[0]
    assert by_memory[-1] > by_memory[0]
    assert 0.0 <= float(by_memory.min()) <= float(by_memory.max()) <= 1.0


def test_the_words_have_what_the_recipe_leaves_them(inspector: Inspector, tmp_path: Path) -> None:
    """With a share of 1 the words say nothing, whatever they are; judged one after the other, no map is mixed up."""
    write_memory(tmp_path / "m", learnt(inspector, [good_part(number) for number in range(4)]).memory)
    encoded = inspector.encode([bad_part(40)])
    maps = {}
    for share in (0.0, 0.6, 1.0):
        recipe = Recipe(memory=str(tmp_path / "m"), memory_share=share)
        maps[share] = inspector.evidence(encoded, recipe).maps[0]
    assert float((maps[0.6] - maps[1.0]).abs().max()) > 1e-3
    memory = inspector.prepare(recipe).memory
    assert memory is not None
    distances = memory.distances(memory.cells(inspector.levels(encoded)), encoded.tiles)
    limits = inspector.towers.bundle.manifest.thresholds
    for words in (0.1, 0.9):
        other = memory.fuse(torch.full((1, 64, 64), words), distances, min(limits.region, limits.decision), 1.0)
        assert torch.allclose(other[0], maps[1.0], atol=1e-6)
    farther = memory.fuse(inspector.zero_shot(encoded, recipe), 3.0 * distances, limits.region, 0.0)
    assert torch.allclose(farther[0], maps[0.0], atol=1e-6)


def test_where_a_recipe_cuts_s_a_a_memory_has_its_start(inspector: Inspector, tmp_path: Path) -> None:
    """What the memory finds striking is as far above the recipe's own cut as it is above the bundle's."""
    write_memory(tmp_path / "m", learnt(inspector, [good_part(number) for number in range(4)]).memory)
    encoded = inspector.encode([bad_part(40)])
    own = inspector.evidence(encoded, Recipe(memory=str(tmp_path / "m"))).maps[0]
    thresholds = inspector.towers.bundle.manifest.thresholds
    start = min(thresholds.region, thresholds.decision)
    low = Recipe(memory=str(tmp_path / "m"), prompt=PromptSettings(region_threshold=0.2))
    moved = inspector.evidence(encoded, low)
    assert torch.allclose(moved.maps[0], torch.sigmoid(own.logit() - logit(start) + logit(0.2)), atol=1e-4)
    assert torch.equal(moved.regions[0], own >= start)


def test_words_add_to_what_the_memory_finds_and_never_take_away(inspector: Inspector) -> None:
    """A missing part leaves a clean place: however clean, what the memory says of it stands."""
    memory = learnt(inspector, [good_part(number) for number in range(4)]).memory
    about = memory.about
    wide = max(about.zero_shot_striking - about.zero_shot_ordinary, LEAST_SPREAD)
    told = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    words = (about.zero_shot_ordinary + told * wide).sigmoid().view(5, 1, 1).expand(5, 8, 8)
    far = torch.full((5, 8, 8), 1.2 * about.striking)
    clean, ordinary, striking_a_bit, striking, more = memory.fuse(words, far, 0.5, 0.7)[:, 4, 4].tolist()
    assert clean == ordinary == striking_a_bit
    assert ordinary < striking < more


def test_the_core_covers_and_is_the_same_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    clouds = torch.cat([torch.randn(200, 8, generator=generator) * 0.05 + centre for centre in (0.0, 3.0, 9.0)])
    lonely = torch.full((1, 8), -6.0)
    rows = torch.cat([clouds, lonely])
    chosen = coreset(rows, 20)
    assert len(set(chosen.tolist())) == 20
    assert 600 in chosen.tolist()
    assert torch.equal(chosen, coreset(rows, 20))
    random = torch.randperm(len(rows), generator=generator)[:20]
    assert nearest(rows, rows[chosen]).max() < 0.5 * nearest(rows, rows[random]).max()
    assert torch.equal(coreset(rows[:10], 20), torch.arange(10))


def test_wide_features_are_projected_without_losing_their_angles() -> None:
    assert projection(MOST_CHANNELS) is None
    wide = torch.randn(40, 2048, generator=torch.Generator().manual_seed(3))
    wide = torch.nn.functional.normalize(wide + 0.7 * wide[:1], dim=1)
    matrix = projection(2048)
    assert matrix is not None
    narrow = torch.nn.functional.normalize(wide @ matrix.T, dim=1)
    assert float((narrow @ narrow.T - wide @ wide.T).abs().max()) < 0.25


def test_the_embedded_trunk_hands_out_its_backbone_features() -> None:
    trunk = Lite0Pyramid().eval()
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        levels = trunk.forward_intermediates(picture, indices=[0, 1, 2, *MEMORY_LEVELS], intermediates_only=True)
        fine, middle, _ = trunk.backbone_features(picture)
    assert [level.shape[1] for level in levels[:3]] == [64, 64, 64]
    assert torch.equal(levels[3], fine)
    assert torch.equal(levels[4], middle)


def test_a_turned_part_passes_where_the_memory_learnt_its_parts_turned(inspector: Inspector, tmp_path: Path) -> None:
    def handed(number: int) -> NDArray[np.uint8]:
        """A plate whose left side is dark: turned, it looks like no other."""
        picture = good_part(number)
        picture[:, :28] -= 60
        return picture

    good = [handed(number) for number in range(6)]
    quarter, bad = np.rot90(handed(30)).copy(), np.rot90(handed(31)).copy()
    bad[40:56, 8:24] = (255, 0, 0)
    highest = {}
    for name, rotations in (("lying", ()), ("turned", (90.0, 180.0, 270.0))):
        recipe = Recipe(memory_rotations=rotations, min_defect_area_px=4)
        write_memory(tmp_path / name, learnt(inspector, good, recipe).memory)
        recipe = recipe.model_copy(update={"memory": str(tmp_path / name)})
        highest[name] = {
            "good": float(inspector.trace(handed(30), recipe).clip_map.max()),
            "quarter": float(inspector.trace(quarter, recipe).clip_map.max()),
            "bad": float(inspector.trace(bad, recipe).clip_map.max()),
        }
        assert (inspector.inspect(quarter, recipe).warning is None) == (name == "turned")
    assert highest["lying"]["quarter"] > 0.5
    assert highest["turned"]["quarter"] < 0.5
    assert highest["turned"]["good"] < 0.5
    assert highest["turned"]["bad"] > 0.9
    wrong = Recipe(memory=str(tmp_path / "turned"))
    with pytest.raises(ConfigError, match="was learnt with other memory_rotations"):
        inspector.prepare(wrong)


def test_turning_keeps_the_part_and_knows_what_was_not_in_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    turned, inside = turn(picture, 180.0, (64, 48))
    assert np.array_equal(turned, picture[::-1, ::-1])
    assert inside.min() > 0.99
    turned, inside = turn(picture, 90.0, (48, 48))  # of the square on the left
    assert np.array_equal(turned[:, :48], np.rot90(picture[:, :48]))
    turned, inside = turn(picture, 90.0, (64, 48))
    assert inside[:, :7].max() == 0.0
    assert inside[:, 8:56].min() > 0.99


def test_what_is_taught_is_remembered_and_nothing_becomes_more_striking(inspector: Inspector) -> None:
    memory = learnt(inspector, [good_part(number) for number in range(6)]).memory
    learner = Learner(inspector, "plates", Recipe())
    marked = [learner.describe(bad_part(number), str(number)) for number in (20, 21)]
    taught = teach(memory, [*marked, replace(marked[0], name="again")])
    assert [one.use for one in taught.pictures] == ["learnt", "learnt", "duplicate"]
    assert taught.memory.sha256 == teach(memory, marked[::-1]).memory.sha256 != memory.sha256
    about = taught.memory.about
    assert (about.pictures, about.ordinary, about.striking) == (8, memory.about.ordinary, memory.about.striking)
    for number, picture in enumerate([good_part(40), bad_part(20), bad_part(41)]):
        described = learner.describe(picture, "")
        before, after = (
            one.distances(described.cells.float(), described.tiles).max() for one in (memory, taught.memory)
        )
        assert after <= before + 1e-4
        if number == 1:
            assert after <= 0.5 * (about.ordinary + about.striking) + 1e-2 < before
    assert [one.use for one in teach(taught.memory, marked).pictures] == ["known", "known"]
    with pytest.raises(ImageError, match="64 x 64"):
        teach(memory, [learner.describe(np.zeros((50, 64, 3), np.uint8), "small")])


def test_one_that_is_unlike_the_other_marked_parts_is_left_out(inspector: Inspector) -> None:
    memory = learnt(inspector, [good_part(number) for number in range(6)]).memory
    learner = Learner(inspector, "plates", Recipe())
    marked = []
    for number in range(5):
        picture = good_part(50 + number)
        picture[50:58, 8:16] = 150  # a faint mark
        marked.append(learner.describe(picture, str(number)))
    marked.append(learner.describe(bad_part(60), "bad"))
    assert [one.name for one in teach(memory, marked).pictures if one.use == "outlier"] == ["bad"]
    assert {one.use for one in teach(memory, marked, keep_all=True).pictures} == {"learnt"}
