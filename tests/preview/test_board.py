"""What the page is told stays bounded, and an observer that fails costs no verdict."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from flawline.agent import board, shot
from flawline.agent.board import HISTORY, Board
from flawline.agent.observer import Observers
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


def planes(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mask = np.zeros((height, width), np.uint8)
    mask[10:15, 10:15] = 255
    return np.full((height, width, 3), 90, np.uint8), mask, mask // 2


def test_histories_and_failed_parts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "_FAILS_PER_S", 1e9)
    kept = Board(PreviewSettings(fails_kept=5), ["top"])
    for seq in range(1, HISTORY + 100):
        kept.judged(header(seq), *planes(40, 60), [])
    assert len(kept.history["top"]) == HISTORY
    assert list(kept.fails) == list(range(HISTORY + 95, HISTORY + 100))
    assert [entry["seq"] for entry in kept.since_event(HISTORY + 90)] == list(range(HISTORY + 91, HISTORY + 100))
    assert kept.summary()["counts"] == {"pass": 0, "fail": HISTORY + 99, "error": 0}


def test_when_every_part_fails_few_are_copied() -> None:
    kept = Board(PreviewSettings(), ["top"])
    for seq in range(1, 50):
        kept.judged(header(seq), *planes(40, 60), [])
    assert 1 <= len(kept.fails) <= 3


def test_counters_start_again_with_a_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.mktime((2026, 3, 5, 13, 59, 50, 0, 0, -1))
    monkeypatch.setattr(board.time, "time", lambda: now)
    kept = Board(PreviewSettings(shifts=("06:00", "14:00")), ["top"])
    kept.judged(header(1, "pass"), *planes(40, 60), [])
    now += 9
    assert kept.summary()["counts"]["pass"] == 1
    now += 2
    assert kept.summary()["counts"]["pass"] == 0
    assert time.localtime(kept.summary()["since"])[3:5] == (14, 0)
    now += 16 * 3600
    kept.judged(header(2, "pass"), *planes(40, 60), [])
    assert kept.summary()["counts"]["pass"] == 1
    assert time.localtime(kept.summary()["since"])[3:5] == (6, 0)


def test_a_drawing_is_bounded_whatever_the_mask() -> None:
    rng = np.random.default_rng(1)
    picture = np.zeros((1080, 1920, 3), np.uint8)
    speckles = np.where(rng.random((1080, 1920)) < 0.2, 255, 0).astype(np.uint8)
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


def test_an_observer_that_fails_does_not_keep_the_others_from_looking() -> None:
    seen: list[int] = []

    class Fails:
        def judged(self, header: dict[str, Any], *_: Any) -> None:
            raise RuntimeError("no")

    class Looks:
        def judged(self, header: dict[str, Any], *_: Any) -> None:
            seen.append(header["seq"])

    observers = Observers([Fails(), Looks()])
    for seq in (1, 2):
        observers.judged(header(seq), None, None, None, [])
    assert seen == [1, 2]


def test_two_streams_share_a_thread_without_mixing_pictures() -> None:
    from flawline.agent.encode import VideoEncoder

    with ThreadPoolExecutor(1) as thread:
        made = [VideoEncoder("vp8", 64, 48, 10, 500), VideoEncoder("vp8", 64, 48, 10, 500)]
        for number in range(6):
            picture = np.full((48, 64, 3), 40 * number, np.uint8)
            packets = [thread.submit(one.encode, picture, number * 9000, key=number == 3).result() for one in made]
            assert [packet.is_keyframe for (packet,) in packets] == [number in (0, 3)] * 2
            assert [packet.pts for (packet,) in packets] == [number * 9000] * 2
