"""A camera that ignores a software trigger without a word must not shift the following frames onto other parts."""

import asyncio
import queue
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from test_times import Way
from test_worker_client import until

from flawline.agent.intake import Intake
from flawline.agent.line import Line
from flawline.agent.recipes import RecipeBook
from flawline.agent.verdict import ActiveRecipe, Job
from flawline.camera.camera import Camera
from flawline.camera.frame import Frame
from flawline.camera.simulated import SimulatedCamera
from flawline.config.recipe import Recipe
from flawline.config.settings import Settings
from flawline.config.settings_camera import CameraSettings

MS = 1_000_000
PICTURE = np.zeros((2, 2, 3), np.uint8)


class Belt:
    """A line whose triggers are sent at given times, and exposed some milliseconds later."""

    def __init__(self) -> None:
        settings = CameraSettings(name="top", trigger="software")
        self.line = Line(SimulatedCamera(settings), settings)
        self.start = time.monotonic_ns()

    def send(self, at_ms: float) -> None:
        recipe = ActiveRecipe("default", 1, Recipe(), None)
        self.line.pending.append(Job("top", recipe, 0, 0.0, sent_mono=self.start + int(at_ms * MS)))

    def frame(self, exposed_ms: float, *, clocked: bool = True) -> Frame:
        return Frame(0, 0, PICTURE, clocked=clocked, mono_grab=self.start + int(exposed_ms * MS))

    def run(self, count: int, every_ms: float = 50.0) -> None:
        for number in range(count):
            self.send(number * every_ms)
            self.line.answer(self.frame(number * every_ms + 3.0 + number % 4))


def test_the_next_triggers_frame_is_not_taken_for_an_ignored_one() -> None:
    belt = Belt()
    belt.run(8)
    belt.send(400)  # ignored
    belt.send(450)
    assert belt.line.has_ignored_one(belt.frame(450 + 3.0))
    assert belt.line.has_ignored_one(belt.frame(450 + 9.0))


def test_frames_that_come_while_other_triggers_wait_are_their_own() -> None:
    belt = Belt()
    belt.run(8)
    for at_ms in (400, 410, 420):  # sent before the first one's frame has arrived
        belt.send(at_ms)
    for at_ms in (400, 410):
        assert not belt.line.has_ignored_one(belt.frame(at_ms + 6.0))
        belt.line.answer(belt.frame(at_ms + 6.0))
    assert not belt.line.has_ignored_one(belt.frame(500))  # no other waits: a late one is the time limit's matter


def test_it_is_told_only_by_the_cameras_clock_and_when_enough_is_known() -> None:
    belt = Belt()
    belt.run(7)
    belt.send(400)
    belt.send(450)
    assert not belt.line.has_ignored_one(belt.frame(454)), "seven lags are too few"
    belt.line.pending = deque()
    belt.run(8)
    belt.send(400)
    belt.send(450)
    assert not belt.line.has_ignored_one(belt.frame(454, clocked=False)), "by its arrival nothing can be told"
    belt.line.is_lost("gone")
    assert not belt.line.has_ignored_one(belt.frame(454)), "another clock may have begun"


class Forgetful(Camera):
    """Stamps its frames with a clock of its own, and ignores the trigger number `ignores`."""

    name = "top"

    def __init__(self, ignores: int) -> None:
        self._ignores = ignores
        self._triggers = 0
        self._exposed: queue.Queue[int] = queue.Queue()
        self.opened = 0

    def open(self) -> None:
        self.opened += 1

    def trigger(self) -> None:
        self._triggers += 1
        if self._triggers != self._ignores:
            self._exposed.put(time.monotonic_ns() + 3 * MS)

    def grab(self, timeout_s: float) -> Frame | None:
        try:
            exposed = self._exposed.get(timeout=timeout_s)
        except queue.Empty:
            return None
        return Frame(self._triggers, time.time_ns(), PICTURE, clocked=True, mono_grab=exposed)

    def close(self) -> None:
        pass


async def test_all_that_wait_are_answered_and_the_camera_is_opened_again(tmp_path: Path) -> None:
    way = Way(tmp_path)
    camera = Forgetful(ignores=9)
    settings = CameraSettings(name="top", trigger="software", guard={"enabled": False})
    recipes = RecipeBook(Settings(cameras=[settings], recipes={"default": Recipe()}), way.journal)  # no deadline
    intake = Intake([(camera, settings)], way.ring, recipes, way.pipeline, way.outbox, 20, None)
    line = intake.lines["top"]
    grabbing = asyncio.create_task(intake.run_camera(line))
    await intake.until_open(30)

    for number in range(8):
        await intake.trigger("top", str(number), None)
        await until(lambda: not line.pending)
    assert len(line.lags) == 8
    await asyncio.gather(*(intake.trigger("top", name, None) for name in ("ignored", "next")))
    await until(lambda: {"ignored", "next"} <= {header["trigger_id"] for header in way.seen} and camera.opened == 2)
    last = {header["trigger_id"]: header for header in way.seen}
    for name in ("ignored", "next"):
        assert (last[name]["reason"], last[name]["frame_id"]) == ("camera_fault", None)
    assert "has ignored a trigger" in last["ignored"]["detail"]
    intake.stop()
    await asyncio.wait_for(grabbing, 30)
    intake.close()
    await way.close()


class Slow(Forgetful):
    """Takes a while to start an exposure."""

    def __init__(self) -> None:
        super().__init__(ignores=0)
        self.asked = 0

    def trigger(self) -> None:
        self.asked += 1
        time.sleep(0.4)


async def test_a_trigger_that_was_answered_in_the_queue_makes_no_exposure(tmp_path: Path) -> None:
    way = Way(tmp_path)
    camera = Slow()
    settings = CameraSettings(name="top", trigger="software", trigger_timeout_ms=100, guard={"enabled": False})
    recipes = RecipeBook(Settings(cameras=[settings], recipes={"default": Recipe()}), way.journal)
    intake = Intake([(camera, settings)], way.ring, recipes, way.pipeline, way.outbox, 20, None)
    line = intake.lines["top"]
    grabbing = asyncio.create_task(intake.run_camera(line))
    await intake.until_open(30)
    await asyncio.gather(*(intake.trigger("top", name, None) for name in "ABC"))
    await until(lambda: {header["trigger_id"] for header in way.seen} == {"A", "B", "C"})
    assert {header["reason"] for header in way.seen} == {"camera_fault"}
    await asyncio.get_running_loop().run_in_executor(line.trigger_thread, lambda: None)  # behind all that was queued
    assert camera.asked == 1
    intake.stop()
    await asyncio.wait_for(grabbing, 30)
    intake.close()
    await way.close()


TRANSFER_MS = 400


class LineWithTransfer(Camera):
    """Exposed by its own line at the given times; its clock says TRANSFER_MS more, as the transfer takes.

    The host's UTC is wrong by `wrong_ms` and set right, so that `t_grab` is.
    """

    name = "top"

    def __init__(self, exposures_ms: list[int], wrong_ms: int = 0) -> None:
        self._start = time.monotonic_ns() + 100 * MS
        self._wrong_ns = wrong_ms * MS
        self._left = deque((number, at) for number, at in enumerate(exposures_ms))

    def at(self, ms: int) -> float:
        """Seconds from now until so many ms after the start."""
        return max(0.0, (self._start + ms * MS - time.monotonic_ns()) / 1e9)

    def open(self) -> None:
        pass

    def grab(self, timeout_s: float) -> Frame | None:
        if not self._left or self.at(self._left[0][1] + TRANSFER_MS) > timeout_s:
            time.sleep(timeout_s)
            return None
        number, exposed = self._left.popleft()
        time.sleep(self.at(exposed + TRANSFER_MS))
        stamped = self._start + (exposed + TRANSFER_MS) * MS
        return Frame(number, time.time_ns() + self._wrong_ns, PICTURE, clocked=True, mono_grab=stamped)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("transfer_ms", "wrong_ms"), [(0, 0), (TRANSFER_MS, 0), (TRANSFER_MS, -600), (TRANSFER_MS, 600)]
)
async def test_a_part_that_is_announced_during_a_transfer_is_the_next_frames(
    tmp_path: Path, transfer_ms: int, wrong_ms: int
) -> None:
    """Whatever the host's clock is set to meanwhile."""
    way = Way(tmp_path)
    camera = LineWithTransfer([400, 1200, 2000], wrong_ms)
    settings = CameraSettings(name="top", trigger="hardware", transfer_ms=transfer_ms, guard={"enabled": False})
    recipes = RecipeBook(Settings(cameras=[settings], recipes={"default": Recipe(deadline_ms=1)}), way.journal)
    intake = Intake([(camera, settings)], way.ring, recipes, way.pipeline, way.outbox, 20, None)
    line = intake.lines["top"]
    grabbing = asyncio.create_task(intake.run_camera(line))
    await intake.until_open(30)
    intake.running = True
    # Each in the middle of the transfer of the one before: 200 ms of a busy machine are left on either side.
    for name, at_ms in (("P0", 200), ("P1", 600), ("P2", 1400)):
        await asyncio.sleep(camera.at(at_ms))
        await intake.announce("top", None, name)
    await until(lambda: {header["frame_id"] for header in way.seen} >= {0, 1, 2})
    named = {header["frame_id"]: header["part_id"] for header in way.seen if header["frame_id"] is not None}
    if transfer_ms:
        assert named == {0: "P0", 1: "P1", 2: "P2"}
    else:  # what happens where nobody has said how long it takes
        assert named == {0: "P1", 1: "P2", 2: None}
    intake.stop()
    await asyncio.wait_for(grabbing, 30)
    intake.close()
    await way.close()
