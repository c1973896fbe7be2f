"""Whose frame is next where several cameras share the worker."""

import time
from pathlib import Path
from typing import Any

import pytest
from test_times import Way

from flawline.agent import pipeline
from flawline.agent.verdict import Job


async def test_no_camera_starves_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However full one camera's queue always is: each of the others has its turn."""
    monkeypatch.setattr(pipeline, "_IN_FLIGHT", 1)
    way = Way(tmp_path)
    sent: list[dict[str, Any]] = []
    way.pipeline.worker.ready = True
    monkeypatch.setattr(way.pipeline.worker, "send", lambda message: sent.append(message) is None)
    cameras: dict[int, str] = {}

    def come(camera: str) -> None:
        job = Job(camera, way.recipes.of("top"), time.time_ns(), time.monotonic(), frame_id=len(cameras))
        way.pipeline.accept(job)
        cameras[job.number] = camera
        job.slot, job.height, job.width = way.ring.acquire(), 8, 8
        way.pipeline.submit(job)

    def be_done() -> None:
        answer = {"op": "failed_job", "job": sent[-1]["job"], "refining": False, "reason": "internal", "error": ""}
        way.pipeline.on_message(answer)

    for camera in ("fast", "fast", "fast", "slow"):
        come(camera)
    for _ in range(6):
        be_done()
        come("fast" if len(sent) % 2 else "slow")
    assert [cameras[message["job"]] for message in sent] == ["fast", "slow", "fast", "slow", "fast", "slow", "fast"]
    await way.close()
