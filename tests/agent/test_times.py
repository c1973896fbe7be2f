"""Times that a verdict tells: from when its deadline counts, and when it really went out."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from test_worker_client import until

from flawline.agent.archive import Archive
from flawline.agent.intake import Intake
from flawline.agent.journal import Journal
from flawline.agent.outbox import Outbox
from flawline.agent.pipeline import Pipeline
from flawline.agent.publisher import Publisher
from flawline.agent.recipes import RecipeBook
from flawline.agent.verdict import Job, VerdictWriter
from flawline.agent.worker_client import WorkerClient
from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.ring import FrameRing
from flawline.config.recipe import Recipe
from flawline.config.settings import JournalSettings, PublishSettings, Settings
from flawline.config.settings_camera import CameraSettings


class FarCamera(Camera):
    """Its one frame was exposed `ago_s` before it arrives; meanwhile the host's clock was put on by `-clock_s`."""

    name = "top"

    def __init__(self, ago_s: float, clock_s: float) -> None:
        self._ago_s, self._clock_s = ago_s, clock_s
        self.exposed_mono: float | None = None

    def open(self) -> None:
        pass

    def grab(self, timeout_s: float) -> Frame | None:
        if self.exposed_mono is not None:
            time.sleep(timeout_s)
            return None
        self.exposed_mono = time.monotonic()
        t_grab = time.time_ns() + int(self._clock_s * 1e9)
        time.sleep(self._ago_s)
        pixels = np.full((8, 8, 3), 128, np.uint8)
        return Frame(0, t_grab, pixels, "RGB8", mono_grab=int(self.exposed_mono * 1e9))

    def close(self) -> None:
        pass


class SlowDisk(Journal):
    """A commit takes `pause_s`."""

    pause_s = 0.0

    def commit(self, *arguments: Any, **more: Any) -> None:
        time.sleep(self.pause_s)
        super().commit(*arguments, **more)


class Way:
    """A station's way out, without a worker; `seen` are the headers that went out."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        publish = PublishSettings(endpoint=f"ipc://{folder}/out")
        self.ring = FrameRing(4, 10_000)
        self.journal = SlowDisk(folder / "line1")
        self._publisher = Publisher(self._context, publish, "line1")
        archive = Archive(folder / "pictures", JournalSettings())
        self.outbox = Outbox(publish, self.ring, self.journal, self._publisher, archive)
        recipes = {"default": Recipe(deadline_ms=100)}
        self.settings = Settings(
            cameras=[CameraSettings(name="top", guard={"enabled": False})], recipes=recipes, publish=publish
        )
        self.recipes = RecipeBook(self.settings, self.journal)
        self.pipeline = Pipeline(self.ring, VerdictWriter("line1", "boot", "0"), self.outbox, 2)
        model, worker = self.settings.model, self.settings.worker
        self.pipeline.worker = WorkerClient(
            *(self.ring, model, worker, dict, print, print, self.pipeline.on_worker_lost),
            on_unhealthy=self.pipeline.on_worker_unhealthy,
        )
        self.seen: list[dict[str, Any]] = []
        self.outbox.observers.append(lambda _, header: self.seen.append(header))
        self.running = asyncio.create_task(self.outbox.run())

    async def first(self) -> dict[str, Any]:
        """The first header that went out."""
        for _ in range(6000):
            if self.seen:
                break
            await asyncio.sleep(0.01)
        return self.seen[0]

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])
        self.outbox.close()
        self._publisher.close()
        self._context.destroy(linger=0)
        self.ring.close()
        self.journal.close()


@pytest.fixture
async def way(tmp_path: Path) -> AsyncIterator[Way]:
    made = Way(tmp_path)
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("ago_s", "clock_s"),
    [(0.3, 0.0), (0.3, -3600.0), (0.3, 3600.0)],
    ids=["a long way", "the clock was put on", "the clock was put back"],
)
async def test_a_deadline_counts_from_the_exposure(way: Way, ago_s: float, clock_s: float) -> None:
    camera = FarCamera(ago_s, clock_s)
    intake = Intake([(camera, way.settings.cameras[0])], way.ring, way.recipes, way.pipeline, way.outbox, 2, None)
    grabbing = asyncio.create_task(intake.run_camera(intake.lines["top"]))
    verdict = await way.first()
    assert verdict["reason"] == "deadline"
    assert camera.exposed_mono is not None
    assert abs(verdict["mono_trigger"] / 1e9 - camera.exposed_mono) < 0.05
    intake.stop()
    await asyncio.wait_for(grabbing, 30)
    intake.close()


async def test_what_goes_out_late_says_so_and_the_journal_has_the_deadline(way: Way) -> None:
    way.journal.pause_s = 0.4
    job = Job("top", way.recipes.of("top"), time.time_ns(), time.monotonic())
    way.pipeline.accept(job)
    verdict = await way.first()
    assert verdict["reason"] == "deadline"
    took_s = (verdict["mono_publish"] - verdict["mono_trigger"]) / 1e9
    assert took_s > 0.4
    assert (verdict["t_publish"] - verdict["t_trigger"]) / 1e9 == pytest.approx(took_s, abs=0.05)
    ((journalled,), *_) = way.journal.replay(1, None, 10)
    assert journalled["mono_publish"] - journalled["mono_trigger"] >= 99_000_000
    assert {**journalled, **{key: verdict[key] for key in ("t_publish", "mono_publish")}} == verdict


async def test_a_files_name_may_be_any_bytes(way: Way) -> None:
    """The verdict on a file that cannot be read names it, and the line goes on."""
    for name in ("Pr\udcfcfteil.png", "next.png"):  # the first is Latin-1 of a share, as Python reads it
        job = Job("top", way.recipes.of("top"), time.time_ns(), time.monotonic())
        way.pipeline.accept(job)
        way.pipeline.fail(job, "bad_frame", f"{name}: is empty")
    await until(lambda: len(way.seen) == 2)
    assert [header["detail"] for header in way.seen] == ["Pr\\udcfcfteil.png: is empty", "next.png: is empty"]
    assert [header["detail"] for header in way.journal.replay(1, None, 9).verdicts] == [
        header["detail"] for header in way.seen
    ]


async def test_a_picture_that_cannot_be_converted_is_answered_and_its_slot_used_again(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("flawline.agent.line.to_rgb8", no_memory)
    camera = FarCamera(0.0, 0.0)
    intake = Intake([(camera, way.settings.cameras[0])], way.ring, way.recipes, way.pipeline, way.outbox, 2, None)
    grabbing = asyncio.create_task(intake.run_camera(intake.lines["top"]))
    verdict = await way.first()
    assert (verdict["frame_id"], verdict["reason"]) == (0, "internal")
    assert way.ring.in_use == 0
    intake.stop()
    await asyncio.wait_for(grabbing, 30)
    intake.close()


class Breaks(FarCamera):
    """Its driver fails in a way of its own when it is triggered."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.0)
        self.exposed_mono = 0.0  # no frame

    def trigger(self) -> None:
        raise AttributeError("'NoneType' object has no attribute 'execute'")


async def test_a_trigger_that_a_driver_drops_is_answered_once(way: Way) -> None:
    settings = CameraSettings(name="top", trigger="software", guard={"enabled": False})
    intake = Intake([(Breaks(), settings)], way.ring, way.recipes, way.pipeline, way.outbox, 2, None)
    grabbing = asyncio.create_task(intake.run_camera(intake.lines["top"]))
    await intake.until_open(30)
    assert await intake.trigger("top", "T1", None), "accepted: a reply that says no would bring it again"
    verdict = await way.first()
    assert (verdict["trigger_id"], verdict["reason"]) == ("T1", "camera_fault")
    assert "could not be triggered: 'NoneType' object" in verdict["detail"]
    intake.stop()
    await asyncio.wait_for(grabbing, 30)
    intake.close()


async def test_an_announced_part_is_judged_by_the_recipe_of_its_announcement(way: Way) -> None:
    settings = CameraSettings(name="top", trigger="hardware", guard={"enabled": False})
    camera = FarCamera(0.0, 0.0)
    camera.exposed_mono = 0.0  # nothing yet
    intake = Intake([(camera, settings)], way.ring, way.recipes, way.pipeline, way.outbox, 2, None)
    grabbing = asyncio.create_task(intake.run_camera(intake.lines["top"]))
    await intake.until_open(30)
    await intake.announce("top", "T1", "last of the lot")
    way.recipes.activate(["top"], way.recipes.version_of("next_lot", Recipe(deadline_ms=100, threshold=0.1)))
    camera.exposed_mono = None
    verdict = await way.first()
    assert (verdict["part_id"], verdict["recipe"]["id"]) == ("last of the lot", "default")
    assert verdict["frame_id"] == 0
    intake.stop()
    await asyncio.wait_for(grabbing, 30)
    intake.close()
