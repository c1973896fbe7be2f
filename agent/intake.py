"""The way in: cameras, triggers, and which frame belongs to which trigger. From here on each is owed a verdict.

Free-running cameras: every frame is accepted as it comes. Hardware-triggered: the same, and journalled as a trigger; a
part that was announced is owed a verdict from then on, and gives its names to the next frame exposed.
Software-triggered: a trigger is accepted by command and its exposure made at once; frames answer triggers in order.
When a frame stays away, or one comes that may be the next trigger's, nobody can say which trigger the next one is for:
then all that wait at that camera are answered `camera_fault`, and the camera is closed and opened again, so that no
late frame is taken for another part.
"""

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from flawline.agent.line import GRAB_S, LONGEST_PAUSE_S, Line, Shot
from flawline.agent.outbox import BACKLOG, Outbox
from flawline.agent.pipeline import Pipeline
from flawline.agent.recipes import RecipeBook
from flawline.agent.verdict import ActiveRecipe, Job, Reason, Trigger
from flawline.agent.wire import Header
from flawline.camera.camera import Camera, EndOfFrames
from flawline.camera.frame import Frame
from flawline.camera.ring import FrameRing
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.recipe import Recipe
from flawline.config.settings_camera import CameraSettings

log = structlog.get_logger()
_CLOSE_LIMIT_S = 5.0
_LONGEST_WAY_S = 1.0
"""A frame's way from its exposure to here takes milliseconds; what looks longer may be a camera's clock, set anew."""
_BEFORE_S = 0.001  # before the pipeline answers `deadline`


class Intake:
    """Everything but grabbing happens on the event loop, so nothing is locked."""

    def __init__(
        self,
        cameras: Iterable[tuple[Camera, CameraSettings]],
        ring: FrameRing,
        recipes: RecipeBook,
        pipeline: Pipeline,
        outbox: Outbox,
        queue_depth: int,
        frames_limit: int | None,
    ) -> None:
        self.lines = {settings.name: Line(camera, settings) for camera, settings in cameras}
        self._ring = ring
        self._recipes = recipes
        self._pipeline = pipeline
        self._outbox = outbox
        self._depth = queue_depth
        self._limit = frames_limit
        self._moved = asyncio.Event()
        self.paused = False
        self.running = False
        self.stopping = asyncio.Event()
        self.done = asyncio.Event()
        outbox.on_done = self._on_done

    # -- triggers ---------------------------------------------------------------------------------------------

    def recover(self, triggers: Iterable[Trigger]) -> None:
        """Triggers that an agent accepted before it died: each is answered now."""
        for trigger in triggers:
            key = f"{trigger.recipe}@{trigger.recipe_version}"
            recipe = self._recipes.known(key) or ActiveRecipe(trigger.recipe, trigger.recipe_version, Recipe(), None)
            job = Job(trigger.camera, recipe, trigger.t_trigger, time.monotonic(), trigger=trigger)
            self._accept(self.lines.get(trigger.camera), job)
            self._pipeline.fail(job, "agent_restart", "the agent died before it answered this trigger")

    async def trigger(self, camera: str, trigger_id: str | None, part_id: str | None) -> bool:
        """Accept a trigger: from now on it is owed a verdict. Returns whether it is journalled.

        Raises ConfigError where no verdict could follow: an unknown camera, one that is not triggered by command.
        """
        t_trigger, mono = time.time_ns(), time.monotonic()
        line = self._line_for_command(camera, "software")
        recipe = self._recipes.of(camera)
        trigger = Trigger(camera, trigger_id, part_id, t_trigger, recipe.id, recipe.version)
        job = Job(camera, recipe, t_trigger, mono, trigger=trigger)
        journalled = self._outbox.accept(trigger)
        self._accept(line, job)
        if self.paused:
            self._pipeline.fail(job, "paused", "the agent is paused")
        elif not line.up:
            self._pipeline.fail(job, "camera_fault", line.error or f"camera {camera!r} is {line.state}")
        elif len(line.pending) + self._pipeline.queued(camera) >= self._depth:
            self._pipeline.dropped["trigger", "full"] += 1
            self._pipeline.fail(job, "overrun", "worker.queue_depth triggers are waiting")
        else:
            line.pending.append(job)
            await self._expose(line, job)
        return await journalled

    async def announce(self, camera: str, trigger_id: str | None, part_id: str | None) -> bool:
        """Name the part that a hardware-triggered camera exposes next: it is owed a verdict from now on.

        The next frame exposed after this is its frame, judged by the recipe that is active now. It is answered
        `camera_fault` where none comes within `trigger_timeout_ms`, or where another part is announced before one
        does. Returns whether it is journalled. Raises ConfigError as `trigger` does.
        """
        line = self._line_for_command(camera, "hardware")
        recipe = self._recipes.of(camera)
        trigger = Trigger(camera, trigger_id, part_id, time.time_ns(), recipe.id, recipe.version)
        part = Job(camera, recipe, trigger.t_trigger, time.monotonic(), trigger=trigger)
        journalled = self._outbox.accept(trigger)
        if self.paused:
            self._fail_announced(line, part, "paused", "the agent is paused")
        elif not line.up:
            self._fail_announced(line, part, "camera_fault", line.error or f"camera {camera!r} is {line.state}")
        elif len(line.announced) >= self._depth:
            self._pipeline.dropped["trigger", "full"] += 1
            self._fail_announced(line, part, "overrun", "worker.queue_depth announced parts are waiting")
        else:
            line.announced.append(part)
            limit_s = line.settings.trigger_timeout_ms / 1000
            asyncio.get_running_loop().call_later(limit_s, self._no_part, line, part)
        return await journalled

    def _line_for_command(self, camera: str, kind: str) -> Line:
        """The camera, where a command may trigger it (`software`) or announce a part (`hardware`)."""
        line = self.lines.get(camera)
        if line is None:
            raise ConfigError(f"camera: there is no {camera!r} (there are: {', '.join(self.lines)})")
        if line.settings.trigger != kind:
            what = "commands need" if kind == "software" else "parts are announced to"
            raise ConfigError(f"camera: {camera!r} has trigger = {line.settings.trigger!r}; {what} {kind!r}")
        if not self.running or self.stopping.is_set():
            raise ConfigError(f"the agent is {'stopping' if self.stopping.is_set() else 'starting'}")
        if self._limit is not None and self._outbox.accepted >= self._limit:
            raise ConfigError("the agent has taken as many triggers as --frames allows")
        return line

    def _no_part(self, line: Line, part: Job) -> None:
        if part in line.announced:
            line.announced.remove(part)
            limit = line.settings.trigger_timeout_ms
            why = f"no frame from {line.name!r} within trigger_timeout_ms = {limit} of its announcement"
            self._fail_announced(line, part, "camera_fault", why)
            line.without_frame.append(part)

    def _fail_announced(self, line: Line, part: Job, reason: Reason, why: str) -> None:
        part.mono = time.monotonic()  # an announcement has no deadline: it counts from the exposure
        self._accept(line, part)
        self._pipeline.fail(part, reason, why)

    def _announced_for(self, line: Line, mono_grab: int) -> Job | None:
        """The part last announced before this exposure; those announced before it have got no frame.

        `mono_grab` lies after the exposure by the shortest transfer. Where nobody has said how long that is, what is
        announced in that time is taken for this frame's: then announce after the verdict of the part before.
        """
        found: Job | None = None
        exposed_s = mono_grab / 1e9 - line.settings.transfer_ms / 1000
        line.without_frame.clear()
        while line.announced and line.announced[0].mono <= exposed_s:
            if found is not None:
                why = f"no frame from {line.name!r} before the next part was announced"
                self._fail_announced(line, found, "camera_fault", why)
            found = line.announced.popleft()
        return found

    def _announced_for_lost(self, line: Line, mono_grab: int) -> Job | None:
        """The part that a number stood for which is missing before a frame of `mono_grab`: the oldest announced before.

        One that was answered already, because its frame stayed away, has had its one verdict: it comes back as it is.
        """
        if line.without_frame:
            return line.without_frame.popleft()
        exposed_s = mono_grab / 1e9 - line.settings.transfer_ms / 1000
        if line.announced and line.announced[0].mono <= exposed_s:
            return line.announced.popleft()
        return None

    async def _expose(self, line: Line, job: Job) -> None:
        loop = asyncio.get_running_loop()
        limit_s, limit = line.settings.trigger_timeout_ms / 1000, "trigger_timeout_ms"
        if job.timer is not None and (left := job.timer.when() - _BEFORE_S - loop.time()) < limit_s:
            limit_s, limit = max(0.0, left), "deadline_ms"
        loop.call_later(limit_s, self._no_frame, line, job, limit)
        try:
            async with asyncio.timeout(limit_s):
                await loop.run_in_executor(line.trigger_thread, _send, line.camera, job)
        except TimeoutError:
            pass  # `_no_frame` says it
        except Exception as error:  # the trigger is accepted: whatever a driver raises, it gets its one verdict
            if not isinstance(error, FlawlineError | NotImplementedError):
                log.exception("camera_driver_failed", camera=line.name)
            if job in line.pending:
                self._lose_step(line, f"camera {line.name!r} could not be triggered: {error}")

    def _no_frame(self, line: Line, job: Job, limit: str) -> None:
        """The true reason goes out, and in time: `camera_fault` just before it would be `deadline`."""
        if job in line.pending:
            value = job.recipe.recipe.deadline_ms if limit == "deadline_ms" else line.settings.trigger_timeout_ms
            self._lose_step(line, f"no frame from {line.name!r} within {limit} = {value}")

    def _lose_step(self, line: Line, why: str) -> None:
        """See the head of this file. The camera's task closes and opens it at its next look."""
        line.lose_step(why)
        self._fail_pending(line, why)

    def _fail_pending(self, line: Line, why: str) -> None:
        while line.pending:
            self._pipeline.fail(line.pending.popleft(), "camera_fault", why)
        while line.announced:
            self._fail_announced(line, line.announced.popleft(), "camera_fault", why)
        line.without_frame.clear()

    def _accept(self, line: Line | None, job: Job) -> None:
        if line is not None:
            line.on_their_way += 1
        self._pipeline.accept(job)

    # -- frames -----------------------------------------------------------------------------------------------

    async def run_camera(self, line: Line) -> None:
        """Grab until the source ends or the agent stops; a lost camera is opened again with back-off."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, f"camera-{line.name}")
        while not self.stopping.is_set():
            line.seen_mono = time.monotonic()
            try:
                await loop.run_in_executor(thread, line.camera.open)
                line.out_of_step = False
                if line.state != "lost" or line.settings.trigger != "free":
                    line.is_up()  # one that was lost and runs freely is up with its first frame
                line.tried.set()
                await self._grab_all(line, thread)
            except EndOfFrames:
                log.info("camera_at_end", camera=line.name)
                line.state, line.error = "ended", None
                return
            except Exception as error:  # one camera's fault, even a driver's own, is not the others'
                if isinstance(error, ConfigError) and line.state == "closed":
                    raise  # the very first open: what the camera refuses is a wrong configuration
                if not isinstance(error, FlawlineError) and line.state != "lost":
                    log.exception("camera_driver_failed", camera=line.name)
                line.is_lost(str(error))
                line.tried.set()
                await self._sleep(line, line.pause_s)
                line.pause_s = min(line.pause_s * 2, LONGEST_PAUSE_S)
            finally:
                self._fail_pending(line, line.error or f"camera {line.name!r} was closed")
                await self._close(line, thread)
        line.state = "closed"

    async def _close(self, line: Line, thread: ThreadPoolExecutor) -> None:
        """A driver that hangs must not hold up the verdicts of the others when the agent stops."""
        closed = asyncio.get_running_loop().run_in_executor(thread, line.camera.close)
        await asyncio.wait([closed], timeout=_CLOSE_LIMIT_S)
        if not closed.done():
            log.error("camera_hangs", camera=line.name)
        if self.stopping.is_set():
            thread.shutdown(wait=False)

    async def _sleep(self, line: Line, seconds: float) -> None:
        """Until then, or until the agent stops. Its task comes round meanwhile: to wait is no standstill."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.stopping.is_set():
            line.seen_mono = time.monotonic()
            try:
                async with asyncio.timeout(min(left, GRAB_S)):
                    await self.stopping.wait()
            except TimeoutError:
                pass
        line.seen_mono = time.monotonic()

    async def _grab_all(self, line: Line, thread: ThreadPoolExecutor) -> None:
        """Until the agent stops (and no trigger waits for its frame), or the camera is out of step."""
        loop = asyncio.get_running_loop()
        free = line.settings.trigger == "free"
        while not line.out_of_step and (line.pending or line.announced or not self.stopping.is_set()):
            line.seen_mono = time.monotonic()
            await self._wait_for_room(line, free and line.camera.patient)
            if free and self.paused:
                # What runs freely is not taken in while paused: nobody asked for it. Files wait, other sources flow on.
                if await loop.run_in_executor(thread, line.camera.grab, GRAB_S) is not None:
                    line.is_up()
                    self._pipeline.dropped["intake", "paused"] += 1
                continue
            shot = await loop.run_in_executor(thread, partial(line.grab, self._ring))
            if shot is None:
                continue
            line.frames += 1
            if line.state == "lost":
                line.is_up()
            if line.settings.trigger == "software":
                self._attach_to_trigger(line, shot)
            elif self._limit is not None and self._outbox.accepted >= self._limit:
                self._throw_away(shot)
                self.stopping.set()
            else:
                self._attach_to_part(line, shot)

    async def _wait_for_room(self, line: Line, patient: bool) -> None:
        """A patient source waits while its queue is full, and while the agent is paused: it never overruns.

        Every source waits while the journal hangs.
        """

        def room() -> bool:
            if self.stopping.is_set():
                return True
            if patient and (self.paused or line.on_their_way >= self._depth):
                return False
            return self._outbox.backlog < BACKLOG

        while not room():
            line.seen_mono = time.monotonic()
            self._moved.clear()
            try:
                async with asyncio.timeout(0.2):
                    await self._moved.wait()
            except TimeoutError:
                pass

    def _attach_to_trigger(self, line: Line, shot: Shot) -> None:
        if line.out_of_step or not line.pending:
            self._pipeline.dropped["intake", "no_trigger"] += 1
            self._throw_away(shot)
        elif line.has_ignored_one(shot.frame):
            self._throw_away(shot)
            why = "has ignored a trigger, or sends slowly: a frame came that may be the next trigger's"
            self._lose_step(line, f"camera {line.name!r} {why}")
        else:
            self._attach(line.answer(shot.frame), shot)

    def _attach_to_part(self, line: Line, shot: Shot) -> None:
        """A free-running or hardware-triggered frame is its own trigger, or that of the part announced for it."""
        frame, part = shot.frame, None
        if line.settings.trigger == "hardware":
            find = self._announced_for_lost if frame.lost else self._announced_for
            part = find(line, frame.mono_grab)
        if part is not None and part.verdict is not None:
            self._throw_away(shot)
        else:
            self._attach(self._for_frame(line, shot, part), shot)

    def _for_frame(self, line: Line, shot: Shot, job: Job | None) -> Job:
        """The announced part, or one of its own: owed a verdict from its exposure on."""
        frame = shot.frame
        if job is None:
            job = Job(line.name, self._recipes.of(line.name), frame.t_grab, 0.0)
        job.t_trigger, job.mono = frame.t_grab, _exposed_s(frame)
        if line.settings.trigger == "hardware":
            if job.trigger is None:
                recipe = job.recipe
                job.trigger = Trigger(line.name, None, None, frame.t_grab, recipe.id, recipe.version)
                self._outbox.accept(job.trigger)
            if self.paused:
                shot.trouble = ("paused", "the agent is paused")
        self._accept(line, job)
        return job

    def _attach(self, job: Job, shot: Shot) -> None:
        job.frame_id, job.t_grab = shot.frame.frame_id, shot.frame.t_grab
        if shot.frame.truth:
            log.info("truth", camera=job.camera, frame_id=job.frame_id, **shot.frame.truth)
        if shot.slot is not None:
            job.slot, job.height, job.width = shot.slot, shot.height, shot.width
            job.holds += 1
        if shot.trouble is not None:
            self._pipeline.fail(job, *shot.trouble)
        else:
            self._pipeline.submit(job)

    def _throw_away(self, shot: Shot) -> None:
        if shot.slot is not None:
            self._ring.release(shot.slot)

    # -- room, pause, stop ------------------------------------------------------------------------------------

    def _on_done(self, job: Job) -> None:
        line = self.lines.get(job.camera)
        if line is not None:
            line.on_their_way -= 1
        self._moved.set()
        if self._limit is not None and self._outbox.results.total() >= self._limit:
            self.done.set()

    async def until_open(self, limit_s: float) -> None:
        """Triggers are taken when every camera was opened, or has failed to, or has had so long."""
        tries = [asyncio.ensure_future(line.tried.wait()) for line in self.lines.values()]
        await asyncio.wait(tries, timeout=limit_s)
        for one in tries:
            one.cancel()
        self.running = True

    def pause(self, paused: bool) -> None:
        """While paused, triggers are answered `paused`, and what runs freely is not taken in."""
        self.paused = paused
        self._moved.set()

    def stop(self) -> None:
        """No camera takes in another frame, but for triggers that were accepted."""
        self.stopping.set()
        self._moved.set()

    def close(self) -> None:
        """Leave the threads that made exposures."""
        for line in self.lines.values():
            line.trigger_thread.shutdown(wait=False)

    def status(self) -> Header:
        """Each camera, for the status message."""
        return {
            line.name: line.status()
            | {
                "waiting": self._pipeline.queued(line.name),
                "camera_seq": self._outbox.camera_seqs.get(line.name, 0),
                "device": line.device(),
            }
            for line in self.lines.values()
        }


def _send(camera: Camera, job: Job) -> None:
    """On the line's trigger thread. What was answered while it waited here makes no exposure: its frame would be
    taken for the next trigger's."""
    if job.verdict is not None:
        return
    camera.await_readiness()
    if job.verdict is None:
        job.sent_mono = time.monotonic_ns()  # before: an exposure may be here sooner than the camera's word that it was
        camera.trigger()


def _exposed_s(frame: Frame) -> float:
    """When a frame was exposed, monotonic, s: its deadline counts from there, not from its arrival."""
    way_s = (time.monotonic_ns() - frame.mono_grab) / 1e9
    return time.monotonic() - min(max(0.0, way_s), _LONGEST_WAY_S)
