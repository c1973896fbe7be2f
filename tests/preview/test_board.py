"""What the page is told stays bounded, and an observer that fails costs no verdict."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest

from flawline.agent import board, shot
from flawline.agent.board import HISTORY, Board
from flawline.agent.encode import VideoEncoder
from flawline.agent.fail import Fail
from flawline.agent.observer import JudgedFrame, Onlookers
from flawline.agent.verdict import ActiveRecipe, Job
from flawline.camera.ring import FrameRing
from flawline.camera.simulated import SimulatedCamera
from flawline.config.recipe import Recipe
from flawline.config.settings_camera import CameraSettings
from flawline.config.settings_preview import PreviewSettings


def header(seq: int, result: str = "fail", **more: Any) -> dict[str, Any]:
    fail = result == "fail"
    return {
        **{"seq": seq, "camera": "top", "result": result, "reason": None, "degraded": False, "frame_id": seq},
        **{"score": 0.9 if fail else 0.1, "threshold": 0.5, "part_id": None, "deadline_ms": None},
        **{"recipe": {"id": "default"}, "stage_ms": {"total": 1.0}},
        **{"t_grab": 1, "t_trigger": 1, "t_publish": time.time_ns()},
        "defects": [{"bbox": [10, 10, 5, 5], "area_px": 25, "centroid": [12, 12], "score": 0.9}] if fail else [],
        **more,
    }


def copied(told: dict[str, Any]) -> shot.Shot:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:15, 10:15] = 255
    return shot.take(told, np.full((40, 60, 3), 90, np.uint8), mask, mask // 2, [], 960)


def packed(told: dict[str, Any]) -> Fail:
    return Fail.of(copied(told))


def test_histories_and_failed_parts_are_bounded() -> None:
    kept = Board(PreviewSettings(fails_kept=5), ["top"])
    for seq in range(1, HISTORY + 100):
        kept.note(header(seq))
        kept.keep(packed(header(seq)))
    assert len(kept.history["top"]) == HISTORY
    assert list(kept.fails) == list(range(HISTORY + 95, HISTORY + 100))
    assert [entry["seq"] for entry in kept.since_event(HISTORY + 90)] == list(range(HISTORY + 91, HISTORY + 100))
    assert kept.summary()["counts"] == {"pass": 0, "fail": HISTORY + 99, "error": 0}


def test_a_camera_that_is_configured_no_more_counts_nowhere() -> None:
    """Its triggers may still be owed a verdict when the agent starts without it."""
    kept = Board(PreviewSettings(), ["side"])
    kept.note(header(1))
    assert kept.summary()["counts"] == {"pass": 0, "fail": 0, "error": 0}


def test_when_every_part_fails_few_are_copied() -> None:
    kept = Board(PreviewSettings(), ["top"])
    wanted = [kept.wants(header(seq)) for seq in range(1, 50)]
    assert wanted[0]
    assert sum(wanted) <= 3
    assert not kept.wants(header(50, "pass"))


def test_a_clock_that_was_ahead_does_not_hold_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.mktime((2027, 3, 5, 7, 0, 0, 0, 0, -1))
    monkeypatch.setattr(board.time, "time", lambda: now)
    kept = Board(PreviewSettings(shifts=("06:00", "14:00")), ["top"])
    never = Board(PreviewSettings(shifts=()), ["top"])
    for one in (kept, never):
        one.note(header(1))
    now = time.mktime((2026, 3, 5, 13, 59, 0, 0, 0, -1))
    for one, fails in ((kept, 1), (never, 2)):
        one.note(header(2))
        assert one.summary()["counts"]["fail"] == fails
    assert time.localtime(kept.summary()["since"])[:5] == (2026, 3, 5, 6, 0)
    now = time.mktime((2026, 3, 5, 14, 0, 0, 0, 0, -1))
    assert kept.summary()["counts"]["fail"] == 0


def test_counters_start_again_with_a_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.mktime((2026, 3, 5, 13, 59, 50, 0, 0, -1))
    monkeypatch.setattr(board.time, "time", lambda: now)
    kept = Board(PreviewSettings(shifts=("06:00", "14:00")), ["top"])
    kept.note(header(1, "pass"))
    now += 9
    assert kept.summary()["counts"]["pass"] == 1
    now += 2
    assert kept.summary()["counts"]["pass"] == 0
    assert time.localtime(kept.summary()["since"])[3:5] == (14, 0)
    now += 16 * 3600
    kept.note(header(2, "pass"))
    assert kept.summary()["counts"]["pass"] == 1
    assert time.localtime(kept.summary()["since"])[3:5] == (6, 0)


@pytest.mark.parametrize("began", [(2026, 3, 6, 21, 0, 0), (1970, 1, 2, 0, 0, 0)], ids=["a weekend", "a wrong clock"])
def test_counters_start_again_once_however_long_nothing_came(
    monkeypatch: pytest.MonkeyPatch, began: tuple[int, ...]
) -> None:
    now = time.mktime((*began, 0, 0, -1))  # type: ignore[arg-type]
    monkeypatch.setattr(board.time, "time", lambda: now)
    kept = Board(PreviewSettings(), ["top"])
    kept.note(header(1, "pass"))
    now = time.mktime((2026, 3, 9, 6, 30, 0, 0, 0, -1))
    for seq in range(2, 7):
        kept.note(header(seq, "fail"))
        now += 1
    assert kept.summary()["counts"] == {"pass": 0, "fail": 5, "error": 0}
    assert time.localtime(kept.summary()["since"])[:5] == (2026, 3, 9, 6, 0)
    assert kept.summary()["per_camera"]["top"]["fail"] == 5


def test_a_drawing_is_bounded_whatever_the_mask() -> None:
    rng = np.random.default_rng(1)
    picture = np.zeros((270, 480, 3), np.uint8)
    speckles = np.where(rng.random((270, 480)) < 0.2, 255, 0).astype(np.uint8)
    many = [{"bbox": [1, 1, 9, 9], "area_px": 50, "centroid": [5, 5], "score": 0.7}] * 900
    taken = shot.take(header(1, defects=many), picture, speckles, speckles, [[1.0, 2.0, 1]] * 900, 960)
    found = shot.outlines(taken)
    assert 0 < len(found) <= shot.MAX_OUTLINES
    assert max(len(outline) for outline in found) <= 96
    assert len(shot.overlay(taken, 2**40)) < 64_000


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 5), (641, 481), (4096, 3000), (60, 9000)])
def test_any_frame_size_can_be_shown(width: int, height: int) -> None:
    picture = np.full((height, width, 3), 200, np.uint8)
    mask = np.full((height, width), 255, np.uint8)
    taken = shot.take(header(1), picture, mask, mask, [], 960)
    h, w = taken.picture.shape[:2]
    assert h % 2 == w % 2 == 0
    assert max(h, w) <= max(960, 2)
    assert json.loads(shot.overlay(taken, 5))["frame"] == [width, height]
    for made in (shot.burnt(taken), shot.marked(taken), shot.thumbnail(taken)):
        assert shot.jpeg(made)[:2] == b"\xff\xd8"


def test_a_defect_of_a_few_pixels_keeps_its_outline_in_a_small_preview() -> None:
    mask = np.zeros((3000, 4096), np.uint8)
    mask[1501:1504, 2001:2004] = 255
    taken = shot.take(header(1), np.zeros((3000, 4096, 3), np.uint8), mask, mask, [], 480)
    (outline,) = shot.outlines(taken)
    assert abs(outline.mean(0) * (4096 / 480) - [2002, 1502]).max() < 10


def test_a_refined_part_replaces_the_first_one() -> None:
    kept = Board(PreviewSettings(), ["top"])
    kept.keep(packed(header(1, degraded=True)))
    assert kept.wants(header(1)), "however soon it follows"
    kept.keep(packed(header(1)))
    (fail,) = kept.fails.values()
    assert not fail.header["degraded"]


def test_a_failed_part_is_kept_small_and_gives_its_pictures_back() -> None:
    camera = SimulatedCamera(CameraSettings(name="top"))
    picture = camera.part(0).image
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[100:140, 200:260] = 255
    told = header(1, defects=[{"bbox": [200, 100, 60, 40], "area_px": 2400, "centroid": [230, 120], "score": 0.9}])
    taken = shot.take(told, picture, mask, mask // 2, [[210.0, 120.0, 1]], 960)
    fail = Fail.of(taken)
    packed_bytes = sum(len(file or b"") for file in (fail.thumbnail, fail.picture, fail.mask, fail.anomaly_map))
    raw_bytes = taken.picture.nbytes + mask.nbytes * 2
    assert packed_bytes < raw_bytes / 4, "two dozen of them are kept"
    assert json.loads(fail.drawing)["boxes"] == [[200, 100, 60, 40, 0.9]]
    made = {name: fail.file(name) for name in ("thumb.jpg", "picture.jpg", "marked.jpg", "map.png", "mask.png")}
    seen = {name: cv2.imdecode(np.frombuffer(made[name] or b"", np.uint8), cv2.IMREAD_COLOR) for name in made}
    assert np.abs(seen["picture.jpg"][:, :, ::-1].astype(int) - picture).mean() < 6
    assert (seen["mask.png"][:, :, 0] == mask).all()
    assert seen["map.png"][120, 230].max() > seen["map.png"][10, 10].max()
    edge = np.abs(seen["marked.jpg"].astype(int) - seen["picture.jpg"]).max(axis=2)
    assert edge[95:145, 195:265].max() > 80, "its outline and its box"
    assert edge[300:, :].mean() < 5
    assert seen["thumb.jpg"].shape[1] == 240
    assert fail.file("other.jpg") is None


def test_an_observer_that_fails_does_not_keep_the_others_from_looking() -> None:
    seen: list[JudgedFrame] = []

    class Fails:
        def judged(self, frame: JudgedFrame) -> None:
            raise RuntimeError("no")

    class Looks:
        def judged(self, frame: JudgedFrame) -> None:
            seen.append(frame)

    ring = FrameRing(1, 64 * 48)
    assert ring.acquire() == 0
    told = header(1)
    job = Job("top", ActiveRecipe("default", 1, Recipe(), None), 1, 0.0, verdict=told, slot=0, height=48, width=64)
    onlookers = Onlookers(ring, [Fails(), Looks()])
    ring.picture(0, 48, 64)[:] = 7
    ring.mask(0, 48, 64, refined=True)[:] = 255
    job.holds = 1
    onlookers(job, told)
    onlookers(job, header(1))
    release = seen[0].hold()
    job.let_go(ring)
    assert job.slot == 0, "still held"
    release()
    assert job.slot is None
    assert [frame.kind for frame in seen] == ["verdict", "refined"]
    assert seen[0].picture is not None
    assert seen[0].picture.shape == (48, 64, 3)
    assert seen[0].picture.max() == 7
    assert [None if one.mask is None else int(one.mask.max()) for one in seen] == [0, 255]
    seen.clear()
    ring.close()


def test_two_streams_share_a_thread_without_mixing_pictures() -> None:
    with ThreadPoolExecutor(1) as thread:
        made = [VideoEncoder("vp8", 64, 48, 10, 500), VideoEncoder("vp8", 64, 48, 10, 500)]
        for number in range(6):
            picture = np.full((48, 64, 3), 40 * number, np.uint8)
            packets = [thread.submit(one.encode, picture, number * 9000, key=number == 3).result() for one in made]
            assert [packet.is_keyframe for (packet,) in packets] == [number in (0, 3)] * 2
            assert [packet.pts for (packet,) in packets] == [number * 9000] * 2
