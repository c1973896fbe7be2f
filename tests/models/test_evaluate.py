"""The numbers of an evaluation are those of the inspector's own maps, whatever way the run took."""

import contextlib
import fcntl
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tiny_bundle import write_parts, write_tiny_bundle

from flawline.agent.cli_workbench import evaluate
from flawline.config.errors import ConfigError, FlawlineError, ImageError
from flawline.config.recipe import Recipe
from flawline.models import map_store
from flawline.models.class_report import METRICS
from flawline.models.datasets import read_dataset
from flawline.models.ground_truth import read_mask, read_rgb
from flawline.models.inspector import Inspector
from flawline.models.metrics import pixel_metrics
from flawline.models.row_maps import RowMaps
from flawline.models.study import rows_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workbench")
    write_tiny_bundle(folder / "bundle", region=0.4)
    write_parts(folder / "data", "metal_nut")
    write_parts(folder / "data", "plate", seed=3)
    return folder


def command(place: Path, out: Path, *more: str, root: Path | None = None) -> Result:
    arguments = ["--dataset", "folder", "--root", str(root or place / "data"), "--bundle", str(place / "bundle")]
    return CliRunner().invoke(evaluate, [*arguments, "--out", str(out), *more], catch_exceptions=False)


def content(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def test_native_metrics_are_those_of_the_inspectors_own_maps(place: Path, tmp_path: Path) -> None:
    assert command(place, tmp_path / "out", "--size", "native").exit_code == 0
    results = content(tmp_path / "out")
    assert set(results["sets"]) == {"metal_nut", "plate"}
    inspector = Inspector.load(place / "bundle", device="cpu")
    for category in read_dataset("folder", place / "data"):
        scores, labels, image_scores, maps, masks = [], [], [], [], []
        for sample in category.test:
            picture = read_rgb(sample.image)
            result = inspector.inspect(picture, Recipe(object=category.name.replace("_", " ")))
            mask = read_mask(sample.mask) if sample.mask else np.zeros(picture.shape[:2], bool)
            scores.append(result.anomaly_map.ravel())
            labels.append(mask.ravel())
            maps.append(result.anomaly_map)
            masks.append(mask)
            image_scores.append(result.score)
        pixel, truth = np.concatenate(scores), np.concatenate(labels)
        entry = results["sets"][category.name]
        precision, recall, _ = precision_recall_curve(truth, pixel)
        assert entry["pixel_auroc"] == pytest.approx(roc_auc_score(truth, pixel), abs=1e-5)
        assert entry["pixel_ap"] == pytest.approx(average_precision_score(truth, pixel), abs=1e-5)
        best = np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))
        assert entry["pixel_f1_max"] == pytest.approx(best, abs=1e-5)
        defective = [sample.defective for sample in category.test]
        assert entry["image_auroc"] == pytest.approx(roc_auc_score(defective, image_scores), abs=1e-6)
        assert entry["image_ap"] == pytest.approx(average_precision_score(defective, image_scores), abs=1e-6)
        assert (entry["n_images"], entry["n_defective"]) == (7, 4)
        assert entry["aupro"] == pytest.approx(pixel_metrics(maps, masks).aupro, abs=1e-5)
        precision, recall, _ = precision_recall_curve(defective, image_scores)
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
        assert entry["image_f1_max"] == pytest.approx(best, abs=1e-6)
        rng = np.random.default_rng(1)
        draws = [rng.integers(0, 7, 7) for _ in range(300)]
        drawn = [
            roc_auc_score(np.concatenate([labels[n] for n in draw]), np.concatenate([scores[n] for n in draw]))
            for draw in draws
            if any(labels[n].any() for n in draw)
        ]
        assert entry["ci95"]["pixel_auroc"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    for metric in METRICS:
        mean = np.mean([entry[metric] for entry in results["sets"].values()])
        assert results["mean"][metric] == pytest.approx(mean)


def test_a_map_at_the_metrics_size_is_the_frames_own_stretched(place: Path) -> None:
    """Of a picture that is not square, whose frame SAM pads."""
    inspector = Inspector.load(place / "bundle", device="cpu")
    picture = read_rgb(next(sample.image for sample in read_dataset("folder", place / "data")[0].test if sample.mask))
    wide = np.ascontiguousarray(picture[: picture.shape[0] // 2])
    maps = RowMaps(inspector, rows_of([], ["clip", "blur"]), Recipe(), 96)(wide)
    for row in maps.values():
        stretched = cv2.resize(row.in_frame, (96, 96), interpolation=cv2.INTER_LINEAR)
        assert np.abs(stretched - row.at_size).mean() < 0.1 * row.in_frame.std()
        assert np.abs(stretched[::-1] - row.at_size).mean() > 0.2 * row.in_frame.std()


def test_table_2_dilates_with_the_kernels_that_it_names() -> None:
    rows = {row.key: row.recipe(Recipe()).prompt for row in rows_of(["table2"], [])}
    named = {key: prompt for key, prompt in rows.items() if key.split("_")[0] in ("cross", "rect", "ellipse")}
    assert len(named) == 9
    for key, prompt in named.items():
        assert key == f"{prompt.kernel}_{prompt.kernel_size}"


@pytest.mark.parametrize("size", [None, 96])
def test_ignored_boxes_count_nothing_in_any_row(place: Path, size: int | None) -> None:
    inspector = Inspector.load(place / "bundle", device="cpu")
    sample = next(sample for sample in read_dataset("folder", place / "data")[0].test if sample.mask)
    image = read_rgb(sample.image)
    height, width = image.shape[:2]
    recipe = Recipe(ignore=((0, 0, width, height // 2),))
    maps = RowMaps(inspector, rows_of([], ["clip", "blur", "contrast", "boxes"]), recipe, size)(image)
    for row in maps.values():
        assert not row.in_frame[: height // 2].any()
        assert not row.at_size[: row.at_size.shape[0] // 2 - 2].any()
    assert maps["flawline"].in_frame.any()


def test_all_rows_share_one_encoding_and_the_last_level_is_the_agents_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Inspector.encode
    monkeypatch.setattr(Inspector, "encode", lambda self, *a, **k: encoded.append(1) or encode(self, *a, **k))
    more = ["--ablation", "table3,table2", "--methods", "all,contrast,blur", "--category", "plate"]
    done = command(place, tmp_path / "out", "--size", "96", *more)
    assert done.exit_code == 0, done.output
    assert len(encoded) == 7
    rows = content(tmp_path / "out")["rows"]
    assert set(rows) == {
        *(f"{shape}_{size}" for shape in ("cross", "rect", "ellipse") for size in (20, 25, 30)),
        *("level_1", "level_2", "level_3", "windows", "clip", "boxes", "contrast", "blur", "flawline"),
    }
    own = rows["flawline"]["mean"]
    assert rows["level_3"]["mean"] == own
    assert rows["ellipse_25"]["mean"] == own
    for other in ("level_1", "windows", "clip", "boxes", "contrast", "blur"):
        assert rows[other]["mean"]["pixel_ap"] != own["pixel_ap"]
    assert rows["contrast"]["mean"]["pixel_auroc"] > 0.95  # blue spots on grey plates
    for name in ("results.md", "plots/plate_curves.png", "plots/plate_scores.png", "plots/plate_contact_sheet.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    assert not (tmp_path / "out" / ".work").exists()


def test_ablations_may_be_named_one_after_the_other(place: Path, tmp_path: Path) -> None:
    """As classes may: `--category bottle cable --ablation table2 table3`."""
    more = ["--limit", "1", "--category", "plate", "metal_nut", "--ablation", "table2", "table3"]
    assert command(place, tmp_path / "out", *more).exit_code == 0
    results = content(tmp_path / "out")
    assert set(results["sets"]) == {"metal_nut", "plate"}
    assert {"cross_20", "ellipse_30", "level_1", "level_3"} <= set(results["rows"])


def test_a_recipe_that_only_cuts_s_a_elsewhere_keeps_the_names_of_the_classes(place: Path, tmp_path: Path) -> None:
    """The paper's tables ask with each class's own name, whatever else a file says."""
    file = tmp_path / "cut.toml"
    file.write_text("[recipes.default.prompt]\nregion_threshold = 0.3\n")
    plate = ("--category", "plate", "--config", str(file))
    assert command(place, tmp_path / "file", *plate).exit_code == 0
    of_file = content(tmp_path / "file")["settings"]
    assert command(place, tmp_path / "option", "--category", "metal_nut", "--region-threshold", "0.3").exit_code == 0
    of_option = content(tmp_path / "option")["settings"]
    for settings in (of_file, of_option):
        assert settings["region_threshold"] == 0.3
        assert settings["objects"] in ({"plate": "plate"}, {"metal_nut": "metal nut"})
    file.write_text('[recipes.default]\nobject = "disc"\n')
    assert command(place, tmp_path / "named", *plate).exit_code == 0
    assert content(tmp_path / "named")["settings"]["objects"] == {"plate": "disc"}
    assert "`disc` in every prompt" in (tmp_path / "named" / "results.md").read_text()
    file.write_text('[recipes.default.prompt]\nregion = "otsu"\n')
    assert command(place, tmp_path / "otsu", *plate).exit_code == 0
    assert "S_a by Otsu's method" in (tmp_path / "otsu" / "results.md").read_text()


def test_printed_numbers_stand_beside_ours_on_the_papers_data_sets(place: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", "mvtec", "--root", str(place / "data"), "--bundle", str(place / "bundle")]
    arguments += ["--size", "64", "--out", str(tmp_path / "out"), "--category", "plate", "--methods"]
    done = CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    rows = content(tmp_path / "out")["rows"]
    assert rows["flawline"]["printed"] == {"pixel_auroc": 0.895, "pixel_f1_max": 0.488, "pixel_ap": 0.464}
    assert "sets" not in rows["anomalyclip"]
    assert "printed numbers only" in rows["anomalyclip"]["note"]
    assert "39.1" in done.output
    assert "CLIP's map by trained layers, S_a from 0.4 on" in (tmp_path / "out" / "results.md").read_text()
    assert "printed: means over all 15 classes of mvtec; here 1" in done.output


def test_an_interrupted_run_goes_on_and_ends_with_the_same_results(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--size", "64", "--category", "plate"]
    command(place, tmp_path / "whole", *more)
    append = map_store.MapStore.append
    judged: list[Path] = []

    def counted(self: map_store.MapStore, path: Path, outcome: map_store.Judged) -> None:
        if len(judged) == 5:
            raise KeyboardInterrupt
        append(self, path, outcome)
        judged.append(path)

    monkeypatch.setattr(map_store.MapStore, "append", counted)
    assert command(place, tmp_path / "out", *more).exit_code != 0
    monkeypatch.setattr(map_store.MapStore, "append", append)
    # a line that was being written when the machine went down
    with (tmp_path / "out" / ".work" / "plate" / "done.jsonl").open("a") as stream:
        stream.write('{"path": "half')
    again: list[Path] = []
    monkeypatch.setattr(
        map_store.MapStore, "append", lambda self, path, outcome: (again.append(path), append(self, path, outcome))[1]
    )
    assert command(place, tmp_path / "out", *more).exit_code == 0
    assert len(again) == 7 - 5
    whole, resumed = content(tmp_path / "whole"), content(tmp_path / "out")
    for name, entry in whole["sets"].items():
        for metric in METRICS:
            assert resumed["sets"][name][metric] == entry[metric]


def test_another_setting_does_not_take_up_the_old_maps(tmp_path: Path) -> None:
    scores = np.zeros((2, 3), np.float32)
    store = map_store.MapStore(tmp_path, ["a", "b"], "one")
    store.append(tmp_path / "0.png", map_store.Judged({"a": scores, "b": scores + 1}, {"a": 0.0, "b": 1.0}, {}))
    assert len(map_store.MapStore(tmp_path, ["a", "b"], "one")) == 1
    (stored,) = map_store.MapStore(tmp_path, ["a", "b"], "one").maps("b")
    np.testing.assert_array_equal(stored, scores + 1)
    assert len(map_store.MapStore(tmp_path, ["a", "b"], "two")) == 0
    assert (tmp_path / "a.f32").stat().st_size == 0


def test_a_full_disk_is_said_with_the_file(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").symlink_to("/dev/full")
    with pytest.raises(FlawlineError, match=r"--out .*No space left on device"):
        command(place, out, "--size", "64", "--category", "plate")


def test_two_runs_do_not_write_into_one_folder(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with (tmp_path / "out" / ".work" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another evaluation"):
            command(place, tmp_path / "out", "--size", "64")


def test_what_a_set_cannot_tell_is_null(place: Path, tmp_path: Path) -> None:
    without_masks = write_parts(tmp_path / "data", "no_masks")
    for file in (without_masks / "ground_truth").rglob("*.png"):
        file.unlink()
    for folder in sorted((without_masks / "ground_truth").rglob("*"), reverse=True):
        folder.rmdir()
    (without_masks / "ground_truth").rmdir()
    write_parts(tmp_path / "data", "no_good", good=0, defective=3)
    assert command(place, tmp_path / "out", "--size", "64", root=tmp_path / "data").exit_code == 0
    results = content(tmp_path / "out")
    masks, good = results["sets"]["no_masks"], results["sets"]["no_good"]
    assert all(masks[name] is None for name in METRICS[:4])
    assert masks["image_auroc"] is not None
    assert all(good[name] is None for name in METRICS[4:])
    assert good["pixel_auroc"] is not None
    assert results["mean"]["pixel_auroc"] == good["pixel_auroc"]
    assert results["settings"]["without_masks"] == ["no_masks"]


def test_a_missing_mask_stops_the_run_and_is_listed_when_tolerated(place: Path, tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "data", "plate")
    gone = next((folder / "ground_truth" / "spot").iterdir())
    gone.unlink()
    with pytest.raises(ConfigError, match=gone.name):
        command(place, tmp_path / "out", root=tmp_path / "data")
    assert command(place, tmp_path / "out", "--size", "64", "--tolerate", root=tmp_path / "data").exit_code == 0
    results = content(tmp_path / "out")
    assert gone.name in results["settings"]["problems"][0]
    entry = results["sets"]["plate"]
    assert (entry["n_images"], entry["n_defective"], entry["n_with_masks"]) == (7, 4, 6)


def test_a_files_name_may_be_any_bytes_and_a_refused_picture_is_named(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "nut"
    shutil.copytree(place / "data" / "metal_nut", folder)
    odd = folder / "test" / "good" / os.fsdecode(b"t\xfcr.png")  # Latin-1, from an old archive
    next(iter((folder / "test" / "good").iterdir())).rename(odd)
    (folder / "test" / os.fsdecode(b"l\xf6se.png")).write_bytes(odd.read_bytes())
    done = command(place, tmp_path / "out", root=tmp_path / "data")
    assert done.exit_code == 0, done.output
    assert "l\\udcf6se.png: is left out" in (tmp_path / "out" / "results.md").read_text()
    Image.new("RGB", (1300, 10)).save(folder / "test" / "good" / "strip.png")
    with pytest.raises(ImageError, match=r"good/strip\.png: .*1300 x 10"):
        command(place, tmp_path / "again", root=tmp_path / "data")


def test_a_limited_run_says_so(place: Path, tmp_path: Path) -> None:
    assert command(place, tmp_path / "out", "--size", "64", "--limit", "2", "--category", "plate").exit_code == 0
    results = content(tmp_path / "out")
    assert results["sets"]["plate"]["n_images"] == 4
    assert "subset" in (tmp_path / "out" / "results.md").read_text()


def ray_processes() -> list[str]:
    """Command lines of our own cluster's processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if "/flawline-ray-" in line else []
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a cluster of a dozen processes, two of them with torch
def test_shards_over_ray_give_the_same_numbers(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("ray") is None:  # not imported here: that is the command's part
        pytest.skip("Ray is not installed")
    more = ["--size", "64", "--category", "plate", "--methods", "clip", "--device", "cpu", "--limit", "3"]
    monkeypatch.chdir(place)  # the shards have another working folder
    more += ["--peer", "sdp=./bundle"]
    assert command(place, tmp_path / "one", *more).exit_code == 0
    assert command(place, tmp_path / "two", *more, "--engine", "ray", "--shards", "2").exit_code == 0
    one, two = content(tmp_path / "one")["rows"], content(tmp_path / "two")["rows"]
    for row in ("clip", "sdp", "flawline"):
        for metric in METRICS:
            assert two[row]["mean"][metric] == pytest.approx(one[row]["mean"][metric], abs=1e-9)
    assert content(tmp_path / "two")["settings"]["engine"] == "ray"
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert ray_processes() == [], "the cluster was left behind"
