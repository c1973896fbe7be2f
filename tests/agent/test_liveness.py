"""What counts as progress: an idle line does; a hanging camera, worker or disk does not."""

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq
from test_times import Way

from flawline.agent.archive import Archive
from flawline.agent.intake import Intake
from flawline.agent.journal import Journal
from flawline.agent.liveness import what_stands_still
from flawline.agent.outbox import Outbox
from flawline.agent.publisher import Publisher
from flawline.agent.verdict import Trigger
from flawline.camera.ring import FrameRing
from flawline.camera.simulated import SimulatedCamera
from flawline.config.errors import CameraError
from flawline.config.settings import JournalSettings, PublishSettings


class HangingDisk(Journal):
    """A journal whose commits hang while `hangs` is set, as on a share that is gone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.goes_on = threading.Event()

    def commit(self, *arguments: Any, **more: Any) -> None:
        assert self.goes_on.wait(60)
        super().commit(*arguments, **more)


async def test_a_hanging_commit_is_no_progress_and_an_idle_outbox_is(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    journal, ring = HangingDisk(tmp_path / "line1"), FrameRing(1, 1000)
    settings = PublishSettings(endpoint="ipc://" + str(tmp_path / "out"))
    publisher = Publisher(context, settings, "line1")
    outbox = Outbox(settings, ring, journal, publisher, Archive(tmp_path / "pictures", JournalSettings()))
    running = asyncio.create_task(outbox.run())
    await asyncio.sleep(0.3)
    assert outbox.stuck_s == 0.0
    accepted = outbox.accept(Trigger("top", "A", None, 1, "default", 1))
    await asyncio.sleep(0.5)
    assert 0.4 < outbox.stuck_s < 30
    journal.goes_on.set()
    assert await asyncio.wait_for(accepted, 30)
    await outbox.until_empty(10)
    assert outbox.stuck_s == 0.0
    running.cancel()
    await asyncio.wait([running])
    outbox.close()
    publisher.close()
    context.destroy(linger=0)
    ring.close()
    journal.close()


@pytest.mark.parametrize(
    ("camera", "worker", "stuck_s", "named"),
    [
        ({}, {}, 0.0, []),
        ({"state": "lost"}, {}, 0.0, []),  # it is opened again and again: that is progress
        ({"seen_ago": 31}, {}, 0.0, ["camera top"]),
        ({"seen_ago": 31, "state": "ended"}, {}, 0.0, []),
        ({"seen_ago": 31, "running": False}, {}, 0.0, []),  # still starting
        ({}, {"silent_s": 5.0}, 0.0, ["worker (silent"]),
        ({}, {"hopeless": True}, 0.0, ["worker (dies"]),
        ({}, {}, 11.0, ["publishing"]),
        ({"seen_ago": 31}, {"silent_s": 5.0}, 11.0, ["camera top", "worker (silent", "publishing"]),
    ],
)
def test_what_is_named(camera: dict[str, Any], worker: dict[str, Any], stuck_s: float, named: list[str]) -> None:
    seen = time.monotonic() - camera.get("seen_ago", 0.0)
    line = SimpleNamespace(name="top", state=camera.get("state", "up"), seen_mono=seen)
    intake = SimpleNamespace(running=camera.get("running", True), lines={"top": line})
    client = SimpleNamespace(**{"silent_s": 0.0, "hopeless": False} | worker)
    still = list(what_stands_still(cast(Any, intake), cast(Any, client), cast(Any, SimpleNamespace(stuck_s=stuck_s))))
    assert len(still) == len(named)
    assert all(text.startswith(beginning) for text, beginning in zip(still, named, strict=True)), still


async def test_to_wait_before_a_lost_camera_is_opened_again_is_no_standstill(tmp_path: Path) -> None:
    class Gone(SimulatedCamera):
        def open(self) -> None:
            raise CameraError("gone")

    way = Way(tmp_path)
    [settings] = way.settings.cameras
    intake = Intake([(Gone(settings), settings)], way.ring, way.recipes, way.pipeline, way.outbox, 2, None)
    line = intake.lines["top"]
    line.pause_s = 10.0
    grabbing = asyncio.create_task(intake.run_camera(line))
    await intake.until_open(30)
    await asyncio.sleep(2)
    assert time.monotonic() - line.seen_mono < 1.5
    intake.stop()
    await asyncio.wait_for(grabbing, 5)
    intake.close()
    await way.close()
