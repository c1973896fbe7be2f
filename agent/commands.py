"""The commands of the control socket: what each one takes, does and answers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flawline.agent.intake import Intake
from flawline.agent.journal import Journal
from flawline.agent.outbox import Outbox
from flawline.agent.recipes import RecipeBook
from flawline.agent.verdict import ActiveRecipe
from flawline.agent.wire import Header
from flawline.agent.worker_client import WorkerClient
from flawline.config.errors import ConfigError
from flawline.config.memory_versions import learnt_sha256
from flawline.config.recipe import Recipe

MAX_REPLAY = 500
"""Verdicts in one reply to `replay`; the client goes on with `next_seq`."""

Command = Callable[[Header], Awaitable[Header]]
"""Takes the request, returns what the reply holds beside `id` and `ok`. Raises ValueError, FlawlineError."""


class Commands:
    """By name. Others add theirs with `add`."""

    def __init__(
        self,
        intake: Intake,
        recipes: RecipeBook,
        outbox: Outbox,
        journal: Journal,
        worker: WorkerClient,
        status: Callable[[], Header],
        memory_folders: Sequence[Path],
    ) -> None:
        self._memory_folders = memory_folders
        self._intake = intake
        self._recipes = recipes
        self._outbox = outbox
        self._journal = journal
        self._worker = worker
        self._status = status
        self.switching = asyncio.Lock()  # one change of recipes at a time
        self._readers = ThreadPoolExecutor(1, "replay")
        self._table: dict[str, Command] = {
            "status": self._do_status,
            "trigger": self._trigger,
            "announce": self._trigger,
            "pause": self._pause,
            "resume": self._pause,
            "recipe.list": self._recipe_list,
            "recipe.activate": self._recipe_activate,
            "threshold.get": self._threshold_get,
            "replay": self._replay,
            "feedback": self._feedback,
        }

    def add(self, table: dict[str, Command]) -> None:
        """Make further commands known."""
        self._table |= table

    async def do(self, request: Header) -> Header:
        """Carry out one request."""
        name = request.get("cmd")
        command = self._table.get(name) if isinstance(name, str) else None
        if command is None:
            raise ValueError(f"cmd {shorten(name)} is not known; there are {', '.join(sorted(self._table))}")
        return await command(request)

    async def _do_status(self, _: Header) -> Header:
        return self._status()

    async def _trigger(self, request: Header) -> Header:
        camera = text(request, "camera", 64)
        trigger_id, part_id = (optional_text(request, key, 200) for key in ("trigger_id", "part_id"))
        accept = self._intake.trigger if request["cmd"] == "trigger" else self._intake.announce
        journalled = await accept(camera, trigger_id, part_id)
        return {"camera": camera, "trigger_id": trigger_id, "part_id": part_id, "journalled": journalled}

    async def _pause(self, request: Header) -> Header:
        self._intake.pause(request["cmd"] == "pause")
        return {"paused": self._intake.paused}

    async def _recipe_list(self, _: Header) -> Header:
        return {**self._recipes.list(), "active": self._recipes.status()}

    async def _recipe_activate(self, request: Header) -> Header:
        """`camera` (left out: all), `recipe` (its name), and either `version` or `table`, a new version's content."""
        cameras = self._cameras(request)
        name = text(request, "recipe", 64)
        version = None if request.get("version") is None else integer(request, "version", 1)
        table = request.get("table")
        if table is not None and (not isinstance(table, dict) or version is not None):
            raise ValueError("table must be a map of the recipe's keys, without `version`: a new content gets its own")
        async with self.switching:
            if table is None:
                recipe = self._recipes.find(name, version)
            else:
                recipe = await self._version_of(name, self._recipes.read(name, table))
            threshold = await self._switch(cameras, recipe)
        return {"cameras": cameras, "recipe": {"id": recipe.id, "version": recipe.version}, "threshold": threshold}

    async def change(self, cameras: list[str], name: str, keys: Header) -> tuple[ActiveRecipe, float]:
        """Give the recipe that judges these cameras other values for `keys`: a new version, active at once."""
        async with self.switching:
            recipe = self._recipes.of(cameras[0])
            if recipe.id != name:
                raise ConfigError(f"recipe: camera {cameras[0]!r} is judged by {recipe.id!r} now, not {name!r}")
            changed = await self._version_of(name, recipe.recipe.model_copy(update=keys))
            return changed, await self._switch(cameras, changed)

    async def _version_of(self, name: str, content: Recipe) -> ActiveRecipe:
        """Files are read beside the event loop, and none but memories that were learnt here."""
        sha256 = None
        if content.memory is not None:
            sha256 = self._recipes.memory_known(content.memory)
            if sha256 is None:
                sha256 = await asyncio.to_thread(learnt_sha256, content.memory, self._memory_folders)
        return self._recipes.version_of(name, content, sha256)

    async def _switch(self, cameras: list[str], recipe: ActiveRecipe) -> float:
        """The worker first, so that it knows the recipe when the first frame names it."""
        threshold = await self._worker.add_recipe(recipe.key, recipe.recipe.model_dump(mode="json"))
        self._recipes.activate(cameras, recipe)
        self._recipes.thresholds_are({recipe.key: threshold})
        await self._outbox.on_journal(self._recipes.keep, [recipe], cameras)
        return threshold

    async def _threshold_get(self, request: Header) -> Header:
        """For a `recipe` (and `version`), for a `camera`, or for every camera."""
        if request.get("recipe") is not None:
            version = None if request.get("version") is None else integer(request, "version", 1)
            found = self._recipes.find(text(request, "recipe", 64), version)
            return {"recipe": {"id": found.id, "version": found.version}, "threshold": found.threshold}
        each = {camera: self._recipes.of(camera) for camera in self._cameras(request)}
        reply: Header = {"thresholds": {camera: recipe.threshold for camera, recipe in each.items()}}
        if len(each) == 1:
            (recipe,) = each.values()
            reply |= {"recipe": {"id": recipe.id, "version": recipe.version}, "threshold": recipe.threshold}
        return reply

    def _cameras(self, request: Header) -> list[str]:
        if request.get("camera") is None:
            return list(self._intake.lines)
        camera = text(request, "camera", 64)
        if camera not in self._intake.lines:
            raise ConfigError(f"camera: there is no {camera!r} (there are: {', '.join(self._intake.lines)})")
        return [camera]

    async def _replay(self, request: Header) -> Header:
        first = integer(request, "from_seq", 1)
        last = None if request.get("to_seq") is None else integer(request, "to_seq", 1)
        limit = MAX_REPLAY if request.get("limit") is None else min(integer(request, "limit", 1), MAX_REPLAY)
        # Not what is journalled but not yet out: else a verdict could be seen before its deadline's moment.
        last = self._outbox.last_seq if last is None else min(last, self._outbox.last_seq)
        page = await asyncio.get_running_loop().run_in_executor(self._readers, self._journal.replay, first, last, limit)
        return {**page._asdict(), "last_seq": last}

    async def _feedback(self, request: Header) -> Header:
        label, who = text(request, "label", 64), text(request, "who", 200)
        if not label.strip() or not who.strip():
            raise ValueError("label and who must not be empty: nobody overrules a verdict with nothing")
        note = optional_text(request, "note", 2000) or ""
        await self._outbox.on_journal(self._journal.feedback, integer(request, "seq", 1), label, who, note)
        return {}

    def close(self) -> None:
        """End the thread that reads the journal."""
        self._readers.shutdown()


def shorten(value: object, most: int = 60) -> str:
    """A stranger's value for an error's text."""
    shown = repr(value)
    return shown if len(shown) <= most else shown[:most] + "..."


def integer(request: Header, key: str, least: int) -> int:
    """A whole number of a request. Raises ValueError naming the key."""
    value: Any = request.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{key} must be a whole number of at least {least}")
    return value


def text(request: Header, key: str, most: int) -> str:
    """A text of a request. Raises ValueError naming the key."""
    value = request.get(key)
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{key} must be a text of at most {most} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} is not valid Unicode") from error
    return value


def optional_text(request: Header, key: str, most: int) -> str | None:
    """The same, or None where it is left out."""
    return None if request.get(key) is None else text(request, key, most)
