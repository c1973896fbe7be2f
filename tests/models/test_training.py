"""Training of the embedded bundle: its losses, its pictures, and the whole way in small."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from flawline.agent.cli import cli
from flawline.config.errors import BundleError, ConfigError
from flawline.models.bundle import open_bundle
from flawline.models.inspector import Inspector
from flawline.models.refine import MaskRefiner
from flawline.models.sam import TRUNK, build_sam, load_sam, own_state
from flawline.models.sam_small import LITE0, LITE0_CHANNELS
from flawline.models.training.augment import augment
from flawline.models.training.build import (
    FURTHER_KEPT,
    build_demo,
    go_on_from,
    go_on_plan,
    small_plan,
    with_photographs,
    with_seed,
)
from flawline.models.training.bundle_folder import SAM_SETTINGS
from flawline.models.training.losses import balanced_loss, dice_loss, focal_loss, segmentation_loss, striking_loss
from flawline.models.training.photographs import Album
from flawline.models.training.pictures import CHUNK, Pictures, PictureSet, draw_chunk, draw_set
from flawline.models.training.sam_prompts import CELL, Prompts, Window, draw_shape, draw_target, single_defects
from flawline.models.training.token_table import embed_texts
from flawline.models.training.train_pyramid import PyramidSchedule
from flawline.models.training.train_sam import SamSchedule, WindowRefiner, draw_batch, point_loss, trunk_parameters
from flawline.models.training.validate import auroc, figures


def test_losses_are_their_equations() -> None:
    p = torch.tensor([[[0.9, 0.2], [0.4, 0.1]]])
    g = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    true_class = np.array([0.9, 0.8, 0.4, 0.9])
    expected = np.mean(-((1 - true_class) ** 2) * np.log(true_class))
    assert float(focal_loss(p, g)) == pytest.approx(expected, abs=1e-4)
    assert float(dice_loss(p, g)) == pytest.approx(1 - (2 * 1.3 + 1) / (1.6 + 2 + 1), abs=1e-6)
    balanced = -0.5 * (np.log(0.9) + np.log(0.4)) / 2 - 0.5 * (np.log(0.8) + np.log(0.9)) / 2
    assert float(balanced_loss(p, g)) == pytest.approx(balanced, abs=1e-3)


def test_a_picture_without_a_defect_teaches_only_that_it_is_good() -> None:
    p = torch.full((2, 4, 4), 0.3)
    g = torch.zeros(2, 4, 4)
    g[1, :2] = 1.0
    both = float(segmentation_loss(p, g))
    assert both == pytest.approx(float(balanced_loss(p, g) + focal_loss(p, g) + dice_loss(p[1:], g[1:])), abs=1e-6)


def test_the_most_striking_places_of_good_and_bad_decide_and_a_defects_rim_does_not() -> None:
    p = torch.full((2, 40, 40), 0.1)
    g = torch.zeros(2, 40, 40)
    g[1, 4:8, 4:8] = 1.0
    p[1, 5, 5] = 0.9  # found, at one place
    p[1, 9, 9] = 0.9  # beside it
    before = float(striking_loss(p, g))
    assert before == pytest.approx(-0.5 * np.log(0.9) - 0.5 * np.log(0.9), abs=1e-3)
    p[1, 30, 30] = 0.8  # cries at a good place: one of the two pictures
    assert float(striking_loss(p, g)) - before == pytest.approx(-0.25 * (np.log(0.2) - np.log(0.9)), abs=1e-3)
    assert np.isfinite(float(striking_loss(p[:1], g[:1])))


def test_labels_go_where_the_picture_goes() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image = np.full((96, 96, 3), 40, np.uint8)
        label = np.zeros((96, 96), np.uint8)
        x, y = (int(value) for value in rng.integers(10, 60, 2))
        image[y : y + 24, x : x + 30] = 220
        label[y : y + 24, x : x + 30] = 7
        picture, (plane,) = augment(rng, image, [label], 96)
        assert picture.shape == (96, 96, 3)
        assert set(np.unique(plane)) <= {0, 7}
        grey = picture.mean(axis=2)
        if (plane == 7).sum() > 50 and (plane == 0).sum() > 50:
            inside = cv2.erode((plane == 7).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            assert np.median(grey[inside]) > np.median(grey[plane == 0]) + 20


def test_sams_targets_go_where_their_windows_go() -> None:
    rng = np.random.default_rng(3)
    image = np.full((4, 512, 512, 3), 60, np.uint8)
    kinds, parts = np.zeros((2, 4, 512, 512), np.uint8)
    for row in range(4):
        x, y = (int(value) for value in rng.integers(60, 380, 2))
        image[row, y : y + 70, x : x + 90] = 200
        kinds[row, y : y + 70, x : x + 90] = 1
    pictures = Pictures(image, kinds, parts, [{}] * 4)
    schedule = SamSchedule(shapes=0, windows=4, frames=1, window_batch=8, frame_batch=4)
    for step in range(schedule.steps):
        windows, targets = draw_batch(pictures, schedule, step, lambda row: None)
        edge = 512 if schedule.phase(step) == "frames" else 256
        for window, target in zip(windows, targets, strict=True):
            assert window.shape == (edge, edge, 3)
            assert target.mask.shape == (edge, edge)
            grey = window.mean(axis=2)
            inside = cv2.erode(target.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            assert np.median(grey[inside]) > np.median(grey[~target.mask]) + 20
            corner = np.array([target.window.x, target.window.y]) * CELL
            for x, y in (target.points[target.present & (target.labels == 1)] - corner).astype(int):
                assert target.mask[y, x]
        again, _ = draw_batch(pictures, schedule, step, lambda row: None)
        assert all(np.array_equal(one, other) for one, other in zip(windows, again, strict=True))


def test_an_interrupted_drawing_goes_on_and_gives_the_same_pictures(tmp_path: Path) -> None:
    wanted = PictureSet("few", CHUNK + 5, 96, 9, 0.4)
    first = draw_set(wanted, tmp_path / "a", processes=2)
    folder = tmp_path / "b" / next((tmp_path / "a").iterdir()).name
    folder.mkdir(parents=True)
    draw_chunk(wanted, folder, 0)
    (folder / "image-0001.npy").write_bytes(b"torn")
    again = draw_set(wanted, tmp_path / "b", processes=1)
    assert not list(folder.glob("image-*")), "the chunks' files are kept beside the whole"
    assert np.array_equal(first.image, again.image)
    assert first.words == again.words
    bad = [bool(entry["defects"]) for entry in again.words]
    assert 0.4 < np.mean(bad) < 0.75
    assert all((plane > 0).any() for plane, defective in zip(again.kinds, bad, strict=True) if defective)


def test_parts_are_made_of_photographs_some_of_which_are_kept_from_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    folder = tmp_path / "album"
    (folder / "wood").mkdir(parents=True)
    for number in range(24):  # each of a colour that no drawn material has in such purity
        picture = np.zeros((320, 400, 3), np.uint8)
        picture[:, :, number % 3] = cv2.resize(rng.integers(60, 256, (16, 20), np.uint8), (400, 320))
        cv2.imwrite(str(folder / "wood" / f"{number}.png"), picture)
    cv2.imwrite(str(folder / "icon.png"), picture[:64, :64])
    cv2.imwrite(str(folder / "again.png"), picture)
    cv2.imwrite(str(folder / "blank.png"), np.full((320, 400, 3), 90, np.uint8))
    seen, unseen = Album(folder, unseen=False), Album(folder, unseen=True)
    assert len(seen.files) + len(unseen.files) == 24
    assert not set(seen.files) & set(unseen.files)
    wanted = PictureSet("some", 40, 96, 9, 1.0, photographs=str(folder), photographed=0.5)
    plain = draw_set(replace(wanted, photographed=0.0), tmp_path / "plain", processes=1)
    made = draw_set(wanted, tmp_path / "made", processes=1)
    kept = [np.array_equal(one, other) for one, other in zip(plain.image, made.image, strict=True)]
    assert 10 <= sum(kept) <= 30, "not every part is made of them, and every other one is as before"
    pure = np.sort(made.image[~np.array(kept)].reshape(-1, 96 * 96, 3).astype(float).mean(1), axis=1)
    assert (pure[:, 2] > 1.5 * pure[:, 1]).mean() > 0.3, "the photographs cannot be seen in the parts"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no photographs of at least 300 px"):
        Album(tmp_path / "empty", unseen=False)


def test_prompts_are_true_of_their_target_in_its_window() -> None:
    rng = np.random.default_rng(3)
    kinds = np.zeros((256, 256), np.uint8)
    kinds[120:160, 130:190] = 3
    windows = set()
    for _ in range(300):
        target = draw_target(rng, kinds, np.zeros_like(kinds), 4)
        if target is None:
            continue
        ys, xs = target.window.pixels()
        windows.add((ys.start, xs.start))
        assert target.mask.shape == (128, 128)
        assert (target.mask == (kinds[ys, xs] > 0)).all()
        for (x, y), label, present in zip(target.points, target.labels, target.present, strict=True):
            if present and label:
                assert target.mask[int(y) - ys.start, int(x) - xs.start]
            elif present and ys.start <= y < ys.stop and xs.start <= x < xs.stop:
                assert not target.mask[int(y) - ys.start, int(x) - xs.start]
        if target.box is not None:
            inside = np.argwhere(target.mask) + np.array([ys.start, xs.start])
            tight = np.concatenate([inside.min(0)[::-1], inside.max(0)[::-1]])
            assert np.abs(target.box - tight).max() < 0.1 * 60 * 3
    assert len(windows) > 10


def test_marks_of_one_kind_that_lie_close_are_one_defect() -> None:
    kinds = np.zeros((256, 256), np.uint8)
    kinds[20:24, 20:40], kinds[27:30, 22:38] = 4, 4  # two marks of a scuff, three pixels apart
    kinds[100:110, 100:110] = 4  # far away
    kinds[30:36, 40:46] = 9  # of another kind, close
    count, labels = single_defects(kinds)
    assert count == 4
    assert ((labels > 0) == (kinds > 0)).all()
    assert labels[21, 25] == labels[28, 25]
    assert len({labels[21, 25], labels[105, 105], labels[32, 42]}) == 3
    assert single_defects(np.zeros_like(kinds))[0] == 1


def test_a_shape_is_asked_for_by_its_own_box() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        target = draw_shape(rng, 16, 8)
        assert target.box is not None
        ys, xs = np.nonzero(target.mask)
        top, left = (side.start for side in target.window.pixels())
        assert np.abs(target.box - [xs.min() + left, ys.min() + top, xs.max() + left, ys.max() + top]).max() < 25


def test_further_prompts_say_where_the_mask_was_wrong() -> None:
    rng = np.random.default_rng(5)
    target = draw_shape(rng, 16, 8)
    prompts = Prompts.of([target])
    truth, logits = torch.zeros(1, 32, 32), torch.full((1, 32, 32), -5.0)
    truth[0, 4, 7] = 1.0  # missing: the only pixel that is wrong
    before = int(prompts.present.sum())
    prompts.correct(rng, logits, truth, 0.0)
    assert int(prompts.present.sum()) == before
    prompts.correct(rng, logits, truth, 1.0)
    assert int(prompts.present.sum()) == before + 1
    place = next(k for k in range(prompts.points.shape[1]) if prompts.present[0, k] and not target.present[k])
    assert prompts.points[0, place].tolist() == [target.window.x * 32 + 14.5, target.window.y * 32 + 8.5]
    assert prompts.labels[0, place] == 1
    logits[0, 10:13, 20:25] = 5.0
    prompts.box_in(logits)
    x, y = target.window.x * 32, target.window.y * 32
    assert prompts.boxes[0].tolist() == [x + 40.5, y + 20.5, x + 48.5, y + 24.5]
    assert bool(prompts.boxed[0])


def test_an_answer_that_disagrees_with_a_point_is_wrong_there() -> None:
    rng = np.random.default_rng(6)
    target = draw_shape(rng, 16, 8)
    prompts = Prompts.of([target])
    truth, logits = torch.zeros(1, 32, 32), torch.full((1, 2, 32, 32), -4.0)
    logits[0, :, 8, 9] = 4.0  # too large by one pixel, for which there is now a negative point
    prompts.present[:] = False
    prompts.correct(rng, logits[:, 0], truth, 1.0)
    assert prompts.labels[prompts.present].tolist() == [0]
    wrong = float(point_loss(prompts, logits))
    assert wrong == pytest.approx(np.log1p(np.exp(4.0)), abs=1e-5)
    logits[0, :, 8, 9] = -4.0
    assert float(point_loss(prompts, logits)) == pytest.approx(np.log1p(np.exp(-4.0)), abs=1e-5)


def test_a_window_that_is_the_whole_frame_is_decoded_like_it() -> None:
    settings = SAM_SETTINGS.model_copy(update={"trunk_from_clip": False})
    sam = build_sam(settings, None).eval()
    whole, windowed = MaskRefiner(sam), WindowRefiner(sam)
    windowed.look_at([Window(0, 0, 16)] * 2)
    embedding = torch.randn(2, 128, 64, 64, generator=torch.Generator().manual_seed(1))
    points, labels = torch.tensor([[[100.0, 50.0]], [[300.0, 400.0]]]), torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad():
        first, second = (r.decode(embedding, points, labels, labels == 1)[0] for r in (whole, windowed))
    assert torch.equal(first, second)


def test_the_first_stages_of_the_trunk_are_sams_own_and_the_others_clips(tmp_path: Path) -> None:
    """Trained for masks, they leave CLIP's map as it is; stored is only what CLIP's file does not have."""
    trunk = timm.create_model(LITE0, num_classes=0).eval()
    sam = build_sam(SAM_SETTINGS, trunk)
    mine = sam.image_encoder.trunk
    assert [mine.blocks[n] is trunk.blocks[n] for n in range(7)] == [False] * 5 + [True] * 2
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clips, before = trunk.forward_features(picture), sam.image_encoder(picture)
        for weight in trunk_parameters(sam):
            weight.mul_(1.1)
        assert torch.equal(trunk.forward_features(picture), clips)
        assert not torch.allclose(sam.image_encoder(picture), before)
        stored = own_state(sam, SAM_SETTINGS)
        save_file(stored, tmp_path / "sam.safetensors")
        again = build_sam(SAM_SETTINGS, trunk)
        load_sam(again, SAM_SETTINGS, tmp_path / "sam.safetensors")
        assert torch.equal(again.image_encoder(picture), sam.image_encoder(picture))
    kept = {name.removeprefix(TRUNK).split(".")[0] for name in stored if name.startswith(TRUNK)}
    assert kept == {"conv_stem", "bn1", "blocks"}
    assert {name.split(".")[3] for name in stored if name.startswith(f"{TRUNK}blocks.")} == set("01234")
    deep = {f"{TRUNK}blocks.5.0.conv_pw.weight": trunk.blocks[5][0].conv_pw.weight.detach()}
    save_file(stored | deep, tmp_path / "sam.safetensors")
    with pytest.raises(BundleError, match="holds a trunk"):
        load_sam(again, SAM_SETTINGS, tmp_path / "sam.safetensors")


def test_the_sentence_model_knows_what_is_alike() -> None:
    texts = ["rust", "rusty", "corrosion", "scratch", "scratched", "leather", "wood", "metal", "steel", "cat"]
    table = embed_texts(texts, 8)
    unit = torch.nn.functional.normalize(table, dim=1)
    alike = unit @ unit.T
    assert alike[0, 1] > alike[0, 3] + 0.2
    assert alike[3, 4] > alike[3, 5] + 0.2
    assert alike[7, 8] > alike[7, 9] + 0.2


def test_figures_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(1)
    maps = rng.random((6, 20, 20)).astype(np.float32).round(2)
    truth = (maps + rng.normal(0, 0.4, maps.shape)) > 0.9
    truth[:2] = False
    measured = figures(maps, truth)
    scores, labels = maps.ravel(), truth.ravel()
    wins = (scores[labels][:, None] > scores[~labels][None]).mean()
    ties = (scores[labels][:, None] == scores[~labels][None]).mean()
    assert measured["pixel_auroc"] == pytest.approx(wins + ties / 2, abs=1e-9)
    best = max(2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in np.unique(scores))
    assert measured["pixel_f1_max"] == pytest.approx(best, abs=1e-9)
    assert np.isnan(auroc(scores, np.zeros_like(labels)))


@pytest.mark.slow
def test_the_whole_way_in_small_gives_a_bundle_that_loads(tmp_path: Path) -> None:
    lines: list[str] = []
    build_demo(small_plan(), tmp_path / "work", tmp_path / "demo", lines.append, processes=2)
    inspector = Inspector.load(tmp_path / "demo", device="cpu")
    result = inspector.inspect(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8))
    assert result.anomaly_map.shape == (120, 160)
    hashes = (tmp_path / "demo" / "bundle.toml").read_text()
    lines.clear()
    build_demo(small_plan(), tmp_path / "work", tmp_path / "again", lines.append, processes=2)
    assert not any("step" in line for line in lines), "a finished training was not taken up"
    assert (tmp_path / "again" / "bundle.toml").read_text() == hashes
    start = open_bundle(tmp_path / "demo")
    plan = go_on_plan(small_plan(), start)
    files = {"clip.safetensors", "adapter.safetensors", "sam.safetensors"}
    pyramid = PyramidSchedule(steps=3, batch=4, size=96, copies=1, checkpoint_every=2)
    album = tmp_path / "album"
    album.mkdir()
    for number in range(12):
        coarse = np.random.default_rng(number).integers(0, 256, (16, 20, 3), np.uint8)
        cv2.imwrite(str(album / f"{number}.png"), cv2.resize(coarse, (400, 320)))
    for name, asked, changed, trained in (
        ("later", plan, {"sam.safetensors"}, set()),
        ("deeper", replace(plan, pyramid=pyramid), files, {"laterals", "smooth", "deepen"}),
        (
            "clip alone",
            replace(go_on_plan(small_plan(), start, 2), sam=replace(plan.sam, windows=0, frames=0)),
            files - {"sam.safetensors"},
            {"laterals", "smooth", "deepen", "backbone"},
        ),
        (
            "all",
            with_photographs(go_on_plan(small_plan(), start, 2), album),
            files,
            {"laterals", "smooth", "deepen", "backbone"},
        ),
    ):
        build_demo(asked, tmp_path / f"{name}-work", tmp_path / name, lines.append, processes=2, start=start)
        made = open_bundle(tmp_path / name)
        assert {file for file in files if made.checksum(file) != start.checksum(file)} == changed
        first, second = (load_file(bundle.path("clip.safetensors")) for bundle in (start, made))
        moved = {weight for weight in first if not torch.equal(first[weight], second[weight])}
        assert {weight.split(".")[2] for weight in moved if weight.startswith("visual.trunk.")} == trained
        assert not any(weight.startswith("text.") for weight in moved)
    # what was trained is averaged with what it began with
    trained_to = torch.load(tmp_path / "all-work" / "clip-training.pt", weights_only=True)["average"]
    first, second = (load_file(bundle.path("adapter.safetensors")) for bundle in (start, made))
    for weight, value in second.items():
        expected = trained_to[f"adapter.{weight}"].lerp(first[weight], FURTHER_KEPT)
        assert torch.allclose(value, expected, atol=1e-6)
    assert not any("shapes" in line for line in lines)
    assert sum("clip step 2 unseen" in line for line in lines) == 2


def test_further_steps_need_a_bundle_to_go_on_from(tmp_path: Path) -> None:
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(cli, ["train-demo", *folders, "--clip", "5"])
    assert "--clip needs --from" in f"{answer.output}{answer.exception}"
    assert answer.exit_code != 0
    answer = CliRunner().invoke(cli, ["train-demo", *folders, "--windows", "0"])
    assert "--windows 0 needs --from" in f"{answer.output}{answer.exception}"
    assert not list(tmp_path.iterdir())


def test_another_seed_trains_on_other_pictures_and_is_judged_by_the_same(tmp_path: Path) -> None:
    plan = small_plan()
    other = with_seed(plan, 1)
    first, second = (draw_set(replace(each.clip_pictures, count=4), tmp_path, 1) for each in (plan, other))
    assert [words["captions"] for words in first.words] != [words["captions"] for words in second.words]
    assert not np.array_equal(first.image, second.image)
    assert (other.unseen_pictures, other.sam_unseen) == (plan.unseen_pictures, plan.sam_unseen)
    assert other.sam_pictures.seed != plan.sam_pictures.seed
    assert other.sam.seed != plan.sam.seed
    assert with_seed(plan, 0) == plan


def test_a_sam_with_fewer_blocks_goes_on_as_it_was(tmp_path: Path) -> None:
    settings = SAM_SETTINGS.model_copy(update={"trunk_from_clip": False})
    earlier, later = build_sam(settings, None), build_sam(settings, None)
    levels = [
        torch.randn(1, c, 64 // s, 64 // s, generator=torch.Generator().manual_seed(c))
        for c, s in zip(LITE0_CHANNELS, (1, 2, 4, 8, 16), strict=True)
    ]
    last = f"image_encoder.neck.fine.{len(earlier.image_encoder.neck.fine) - 1}."
    state = {n: v for n, v in earlier.state_dict().items() if not n.startswith(("image_encoder.trunk.", last))}
    save_file(state, tmp_path / "sam.safetensors")
    go_on_from(later, tmp_path / "sam.safetensors", "image_encoder.trunk.", last)
    assert torch.equal(earlier.image_encoder.neck(levels), later.image_encoder.neck(levels))
    save_file({"mask_decoder.other": torch.zeros(1)} | state, tmp_path / "sam.safetensors")
    with pytest.raises(BundleError, match="1 unknown"):
        go_on_from(later, tmp_path / "sam.safetensors", "image_encoder.trunk.", last)
