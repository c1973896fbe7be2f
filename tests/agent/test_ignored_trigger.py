"""A camera that ignores a software trigger without a word must not shift the following frames onto other parts."""

import time
from collections import deque

import numpy as np

from flawline.agent.line import Line
from flawline.agent.verdict import ActiveRecipe, Job
from flawline.camera.frame import Frame
from flawline.camera.simulated import SimulatedCamera
from flawline.config.recipe import Recipe
from flawline.config.settings_camera import CameraSettings

MS = 1_000_000
PICTURE = np.zeros((2, 2, 3), np.uint8)


class Belt:
    """A line whose triggers are sent at given times, and exposed some milliseconds later."""

    def __init__(self) -> None:
        settings = CameraSettings(name="top", trigger="software")
        self.line = Line(SimulatedCamera(settings), settings)
        self.start = time.time_ns()

    def send(self, at_ms: float) -> None:
        recipe = ActiveRecipe("default", 1, Recipe(), None)
        self.line.pending.append(Job("top", recipe, 0, 0.0, t_sent=self.start + int(at_ms * MS)))

    def frame(self, exposed_ms: float, *, clocked: bool = True) -> Frame:
        return Frame(0, self.start + int(exposed_ms * MS), PICTURE, clocked=clocked)

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
