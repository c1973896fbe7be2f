"""`flawline inspect` on real files: what is printed, what is written, and what a bad picture does."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny_bundle import write_tiny_bundle

from flawline.agent.cli import main
from flawline.agent.cli_inspect import find_pictures
from flawline.camera.folder import read_picture
from flawline.config.errors import ConfigError
from flawline.models import inspect_report, overlay
from flawline.models.results import Defect, InspectionResult

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", region=1.0))


@pytest.fixture
def flawline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command line in this process: exit code, lines of stdout, stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: str | Path) -> tuple[int, list[str], str]:
        monkeypatch.setattr("sys.argv", ["flawline", *(str(argument) for argument in arguments)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return run


def write(path: Path, shape: tuple[int, ...] = (48, 60, 3), kind: str = "uint8", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    top = np.iinfo(kind).max
    assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, top, shape).astype(kind))
    return path


def test_a_folder_is_judged_file_by_file_and_mirrored(flawline: Run, bundle: str, tmp_path: Path) -> None:
    root, out = tmp_path / "parts", tmp_path / "out"
    write(root / "a" / "000.png")
    write(root / "b" / "000.png", seed=1)
    write(root / "b" / "000.jpg", (30, 40), seed=2)
    write(root / "deep.tif", (40, 50), "uint16", seed=3)
    (root / "b" / "cut.png").write_bytes((root / "a" / "000.png").read_bytes()[:200])
    (root / "note.txt").write_text("no picture")
    page = tmp_path / "shift" / "page.html"
    code, lines, err = flawline(
        "inspect", root, "--bundle", bundle, "--out", out, "--json", "--threshold", "0.2", "--html", page
    )
    assert code == 0
    records = {Path(record["path"]).relative_to(root).as_posix(): record for record in map(json.loads, lines)}
    assert sorted(records) == ["a/000.png", "b/000.jpg", "b/000.png", "b/cut.png", "deep.tif"]
    for name, record in records.items():
        assert {"result", "score", "threshold", "defects", "stage_ms", "provenance"} <= record.keys()
        assert record["threshold"] == 0.2
        assert record["provenance"]["bundle"] == "tiny"
        judged_by = {"agent", "bundle", "bundle_sha256", "precision", "recipe_sha256", "memory_sha256"}
        assert record["provenance"].keys() == judged_by
        if name != "b/cut.png":
            assert record["result"] == ("fail" if record["defects"] else "pass")
            assert bool(record["defects"]) == (record["score"] >= 0.2)
            assert record["stage_ms"].keys() == {"queue", "clip", "encode", "prompt", "cascade", "total"}
    assert records["a/000.png"]["result"] == "fail"
    broken = records["b/cut.png"]
    assert (broken["result"], broken["reason"], broken["score"]) == ("error", "bad_frame", None)
    assert "cut.png" in broken["detail"]

    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    stems = ["a/000", "b/000", "b/000.png", "deep"]  # the .jpg comes first and has the plain name
    kinds = ("json", "mask.png", "overlay.png")
    assert written == sorted([f"{stem}.{kind}" for stem in stems for kind in kinds] + ["b/cut.json"])
    assert json.loads((out / "a/000.json").read_text()) == records["a/000.png"]
    mask = cv2.imread(str(out / "a/000.mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (48, 60)
    assert set(np.unique(mask)) <= {0, 255}
    assert np.count_nonzero(mask) == sum(defect["area_px"] for defect in records["a/000.png"]["defects"])
    drawn, _ = read_picture(out / "deep.overlay.png")
    assert drawn.shape == (40, 50, 3)

    assert "5 pictures: 0 pass, 4 fail, 1 error; 5 would be rejected (100.0 %)" in err
    assert "<- threshold" in err or "score" in err
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 4
    assert "cut.png" in text
    assert not re.search(r"<script|<link|src=\"(?!data:)|href=", text)


def test_a_report_without_a_name_lies_with_the_results(flawline: Run, bundle: str, tmp_path: Path) -> None:
    picture = write(tmp_path / "a.png")
    code, _, _ = flawline("inspect", picture, "--bundle", bundle, "--out", tmp_path / "out", "--html")
    assert code == 0
    assert "data:image/jpeg;base64," in (tmp_path / "out" / "report.html").read_text()


def test_a_report_with_that_name_lies_where_it_was_asked_for(
    flawline: Run, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = write(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    flawline("inspect", picture, "--bundle", bundle, "--out", tmp_path / "out", "--html", "report.html")
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / "out" / "report.html").exists()


def test_what_the_agent_sees_is_what_is_judged(flawline: Run, bundle: str, tmp_path: Path) -> None:
    """A deep picture is scaled by its depth, and colours are not swapped."""
    eight = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), eight)
    cv2.imwrite(str(tmp_path / "b.png"), eight.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "c.png"), eight[:, :, ::-1])
    _, lines, _ = flawline("inspect", *(tmp_path / f"{n}.png" for n in "abc"), "--bundle", bundle, "--json")
    first, deep, swapped = (json.loads(line)["score"] for line in lines)
    assert first == deep
    assert first != swapped

    from flawline.models.inspector import Inspector

    rgb = np.ascontiguousarray(eight[:, :, ::-1])
    assert Inspector.load(bundle, device="cpu").inspect(rgb).score == pytest.approx(first, abs=1e-6)


def test_a_picture_that_cannot_be_judged_is_named(flawline: Run, bundle: str, tmp_path: Path) -> None:
    line = write(tmp_path / "line.png", (2, 600, 3))
    code, lines, _ = flawline("inspect", line, "--bundle", bundle)
    assert code == 0
    assert lines == [f"error bad_frame: {line}: an image of 600 x 2 pixels cannot be judged"]


def test_words_and_thresholds_come_from_a_recipe(flawline: Run, bundle: str, tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    file = tmp_path / "line.toml"
    recipe = '[recipes.screw]\nobject = "screw"\nthreshold = 0.9999\n'
    file.write_text(f'[model]\nbundle = "{bundle}"\n[recipes.default]\n{recipe}')
    code, lines, _ = flawline("inspect", tmp_path / "a.png", "--config", file, "--recipe", "screw", "--json")
    assert code == 0
    record = json.loads(lines[0])
    assert (record["threshold"], record["result"]) == (0.9999, "pass")
    _, lines, _ = flawline(
        "inspect", tmp_path / "a.png", "--config", file, "--recipe", "screw", "--json", "--object", "tyre"
    )
    other = json.loads(lines[0])
    assert other["provenance"]["recipe_sha256"] != record["provenance"]["recipe_sha256"]
    assert other["score"] != record["score"]
    code, lines, err = flawline("inspect", tmp_path / "a.png", "--config", file, "--recipe", "screw")
    assert lines[0].startswith("pass  score")
    assert len(lines) == 1  # a single file needs no summary
    code, _, err = flawline("inspect", tmp_path / "a.png", "--config", file, "--recipe", "bolt")
    assert (code, err.count("\n")) == (2, 1)


def test_wrong_paths_are_one_line(flawline: Run, bundle: str, tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "gone.png", tmp_path / "empty"):
        code, lines, err = flawline("inspect", tmp_path / "a.png", path, "--bundle", bundle)
        assert (code, lines, err.count("\n")) == (2, [], 1)
        assert str(path) in err
    code, _, err = flawline("inspect", tmp_path / "a.png", "--bundle", bundle, "--out", tmp_path / "a.png" / "x")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = flawline("inspect", tmp_path / "a.png", "--bundle", "nowhere")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("words", ["", "x" * 201])
def test_wrong_words_are_one_line(flawline: Run, bundle: str, tmp_path: Path, words: str) -> None:
    write(tmp_path / "a.png")
    code, lines, err = flawline("inspect", tmp_path / "a.png", "--bundle", bundle, "--object", words)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert "object" in err


def test_a_name_that_is_no_text_does_not_end_the_run(flawline: Run, bundle: str, tmp_path: Path) -> None:
    content = write(tmp_path / "b.png").read_bytes()
    with open(os.fsencode(tmp_path) + b"/a\xff.png", "wb") as stream:
        stream.write(content)
    code, lines, _ = flawline("inspect", tmp_path, "--bundle", bundle)
    assert code == 0
    assert [line.rpartition("/")[2] for line in lines[:2]] == ["a\\xff.png", "b.png"]


def test_every_picture_has_a_name_of_its_own(tmp_path: Path) -> None:
    for name in ("one/x/0.png", "one/x/0.bmp", "two/x/0.png", "two/x/0.jpg"):
        write(tmp_path / name)
    found = find_pictures([tmp_path / "one", tmp_path / "two", tmp_path / "one" / "x" / "0.png"])
    targets = [target.as_posix() for _, target in found]
    assert targets == ["x/0", "x/0.png", "x/0.jpg", "two/x/0", "0"]
    again = find_pictures([tmp_path / "one"] * 4)
    assert len({target for _, target in again}) == len(again) == 8
    with pytest.raises(ConfigError):
        find_pictures([tmp_path / "three"])


def result_of(score: float) -> InspectionResult:
    plane = np.zeros((60, 80), np.float32)
    plane[20:30, 40:60] = score
    mask = plane >= 0.5
    defects = [Defect((40, 20, 20, 10), 200, (49.5, 24.5), score)] if mask.any() else []
    return InspectionResult(plane, mask, score, 0.5, defects)


def test_the_overlay_shows_defects_and_leaves_the_rest() -> None:
    picture = np.full((60, 80, 3), 90, np.uint8)
    failed, passed = overlay.draw(picture, result_of(0.9)), overlay.draw(picture, result_of(0.3))
    assert failed.shape == passed.shape == picture.shape
    assert (failed[20, 40] == overlay.RED).all()
    assert (failed[0, 0] == overlay.RED).all()
    assert (passed[0, 0] == overlay.GREEN).all()
    assert (passed[50, 10] == 90).all()
    assert (picture == 90).all()
    inside = np.abs(passed[25, 50].astype(int) - 90).sum()
    assert 0 < inside < np.abs(failed[25, 50].astype(int) - 90).sum()  # heat, the stronger the higher


def test_the_summary_counts_and_shows_where_scores_lie() -> None:
    records = [{"result": "pass", "score": 0.12, "threshold": 0.5}] * 8
    records += [{"result": "fail", "score": 1.0, "threshold": 0.5}] * 2
    records += [{"result": "error", "score": None, "threshold": 0.5}]
    lines = inspect_report.summary(records)
    assert lines[0] == "11 pictures: 8 pass, 2 fail, 1 error; 3 would be rejected (27.3 %)"
    assert lines[1] == "score 0.10 to 0.15      8 " + "#" * 40
    assert lines[-1] == "score 0.95 to 1.00      2 " + "#" * 10
    assert [line for line in lines if "<- threshold 0.5" in line] == ["score 0.50 to 0.55      0   <- threshold 0.5"]
    assert sum(inspect_report.histogram([0.0, 0.049, 0.05, 1.0])) == 4
    assert inspect_report.histogram([0.0, 0.049, 0.05, 1.0])[:2] == [2, 1]


def test_the_page_escapes_what_files_are_called() -> None:
    record = {"path": "<b>&.png", "result": "pass", "score": 0.1, "threshold": 0.5, "defects": [], "reason": None}
    text = inspect_report.page("t", {"recipe": "<i>"}, [inspect_report.Line(record)])
    assert "&lt;b&gt;&amp;.png" in text
    assert "<i>" not in text


@pytest.mark.parametrize("name", [".", "judged"])
def test_results_of_before_are_no_pictures(flawline: Run, bundle: str, tmp_path: Path, name: str) -> None:
    write(tmp_path / "parts" / "a.png")
    out = tmp_path / "parts" / name
    for _ in range(2):
        code, lines, _ = flawline("inspect", tmp_path / "parts", "--bundle", bundle, "--out", out, "--json")
        assert code == 0
        assert [Path(json.loads(text)["path"]).name for text in lines] == ["a.png"]
    assert {path.name for path in out.rglob("*")} - {"a.png"} == {"a.json", "a.mask.png", "a.overlay.png"}


def test_no_result_takes_the_place_of_a_picture(flawline: Run, bundle: str, tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    truth = write(tmp_path / "a.mask.png", seed=1)
    before = truth.read_bytes()
    code, _, err = flawline("inspect", tmp_path, "--bundle", bundle, "--out", tmp_path)
    assert code == 2
    assert str(truth) in err
    assert truth.read_bytes() == before
    assert not (tmp_path / "a.json").exists()


def test_a_picture_that_has_become_unreadable_leaves_no_old_overlay(flawline: Run, bundle: str, tmp_path: Path) -> None:
    picture, out = write(tmp_path / "a.png"), tmp_path / "out"
    flawline("inspect", picture, "--bundle", bundle, "--out", out)
    assert (out / "a.overlay.png").exists()
    picture.write_bytes(b"")
    flawline("inspect", picture, "--bundle", bundle, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["a.json"]
