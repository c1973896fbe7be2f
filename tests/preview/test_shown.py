"""Which part's picture the video shows, and which failed parts are listed: what the line did with them counts."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import av
import numpy as np
import pytest

from flawline.agent import preview as preview_module
from flawline.agent.fail import Fail
from flawline.agent.metrics import Metrics
from flawline.agent.observer import JudgedFrame
from flawline.agent.preview import Preview
from flawline.agent.shot import Shot
from flawline.config.settings_preview import PreviewSettings

CAMERAS = ["top", "left", "right", "back"]


def judged(seq: int, result: str, kind: str = "verdict", camera: str = "top", **more: Any) -> JudgedFrame:
    fail = result == "fail"
    header = {
        **{"seq": seq, "camera": camera, "result": result, "reason": None, "degraded": False, "frame_id": seq},
        **{"score": None if result == "error" else 0.5, "threshold": 0.5, "part_id": None, "deadline_ms": None},
        **{"recipe": {"id": "default"}, "stage_ms": {}, "t_grab": 1, "t_trigger": 1, "t_publish": time.time_ns()},
        "defects": [{"bbox": [10, 10, 5, 5], "area_px": 25, "centroid": [12, 12], "score": 0.9}] if fail else [],
        **more,
    }
    plane = np.full((40, 60), 255 if fail else 0, np.uint8)
    picture = np.full((40, 60, 3), 90, np.uint8)
    return JudgedFrame(kind, header, picture, plane, plane, [], lambda: lambda: None)  # type: ignore[arg-type]


class Watcher:
    def __init__(self) -> None:
        self.first: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def offer(self, packet: av.Packet, drawing: str) -> bool:
        if drawing and not self.first.done():
            self.first.set_result(json.loads(drawing))
        return True


@asynccontextmanager
async def a_preview() -> AsyncIterator[Preview]:
    made = Preview(PreviewSettings(), "line1", CAMERAS, dict, Metrics(dict, {}, {}))
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await made.close()


async def shown(preview: Preview, camera: str = "top") -> tuple[int, str]:
    """Number and result over the picture that somebody sees who comes to the line now."""
    await asyncio.sleep(0.3)
    watcher = Watcher()
    leave = preview._plain[camera].join(watcher)
    drawing = await asyncio.wait_for(watcher.first, 20)
    leave()
    return drawing["seq"], drawing["result"]


async def test_a_late_result_changes_neither_picture_nor_list() -> None:
    async with a_preview() as preview:
        preview.judged(judged(12, "error", reason="deadline"))
        await asyncio.sleep(0.1)
        preview.judged(judged(12, "pass", "late"))
        assert await shown(preview) == (12, "error"), "the part was rejected"
        preview.judged(judged(13, "pass"))
        await asyncio.sleep(0.1)
        preview.judged(judged(12, "fail", "late"))
        assert await shown(preview) == (13, "pass")
        assert not preview.board.fails


async def test_a_refined_picture_is_shown_while_its_part_is_the_last_one() -> None:
    async with a_preview() as preview:
        preview.judged(judged(1, "fail", degraded=True))
        await asyncio.sleep(0.1)
        preview.judged(judged(2, "pass"))
        await asyncio.sleep(0.1)
        preview.judged(judged(1, "fail", "refined"))
        assert await shown(preview) == (2, "pass")
        assert not preview.board.fails[1].header["degraded"], "but what is kept of the part is the better one"
        preview.judged(judged(2, "fail", "refined"))
        assert await shown(preview) == (2, "pass"), "the line let it pass"
        assert list(preview.board.fails) == [1]


async def test_a_line_that_stops_on_a_failed_part_shows_it() -> None:
    async with a_preview() as preview:
        for seq in range(1, 9):  # nobody watches: more parts than pictures are shown of
            preview.judged(judged(seq, "pass"))
            await asyncio.sleep(0.02)
        preview.judged(judged(9, "fail"))
        assert await shown(preview) == (9, "fail")


async def test_cameras_that_judge_a_part_at_once_all_show_it_and_keep_it() -> None:
    async with a_preview() as preview:
        for seq, camera in enumerate(CAMERAS, 1):
            preview.judged(judged(seq, "fail", camera=camera))
        for seq, camera in enumerate(CAMERAS, 1):
            assert await shown(preview, camera) == (seq, "fail")
        assert sorted(preview.board.fails) == [1, 2, 3, 4]


async def test_packing_a_failed_part_does_not_hold_up_the_next_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    class Slow(Fail):
        @classmethod
        def of(cls, taken: Shot) -> Fail:
            go_on.wait(30)
            return Fail.of(taken)

    monkeypatch.setattr(preview_module, "Fail", Slow)
    async with a_preview() as preview:
        try:
            preview.judged(judged(1, "fail"))
            await asyncio.sleep(0.1)
            preview.judged(judged(2, "pass"))
            assert await shown(preview) == (2, "pass")
            assert not preview.board.fails
        finally:
            go_on.set()
