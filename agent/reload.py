"""Taking up a changed configuration while the line runs: what can be hot is, the rest is named.

All or nothing: where the file is wrong, or the worker refuses a recipe, everything stays as it is.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

from flawline.agent.outbox import Outbox
from flawline.agent.recipes import RecipeBook
from flawline.agent.worker_client import WorkerClient
from flawline.config.errors import FlawlineError
from flawline.config.logging import set_up_logging
from flawline.config.settings import Settings

log = structlog.get_logger()
HOT = ("recipes", "cameras.*.recipe", "publish.masks", "publish.encoding", "log")
"""Keys that a reload takes up, each with all that is below it; `*` stands for the name of any camera."""


class Reloader:
    """Owns the settings that hold now. `read` reads them anew from where they came from."""

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        recipes: RecipeBook,
        worker: WorkerClient,
        outbox: Outbox,
        switching: asyncio.Lock,
    ) -> None:
        self._settings = settings
        self._read = read
        self._recipes = recipes
        self._worker = worker
        self._outbox = outbox
        self._switching = switching

    async def reload(self) -> str:
        """Read, check, take up; returns in a sentence what came of it. Never raises for a wrong file."""
        try:
            new = await asyncio.to_thread(self._read)
            changed = sorted(_changes(self._settings.model_dump(), new.model_dump()))
            hot = [key for key in changed if _is_hot(key)]
            cold = [key for key in changed if not _is_hot(key)]
            moved = await self._take_up(new)
        except FlawlineError as error:
            log.error("reload_refused", error=str(error))
            return f"reload refused, nothing was changed: {error}"
        except Exception as error:  # no file, however odd, ends a line that runs
            log.exception("reload_refused")
            return f"reload refused: {type(error).__name__}: {error}"
        log.info("reloaded", taken_up=hot, needs_restart=cold, judged_from_now_on=moved)
        text = f"reloaded: {', '.join(hot) or 'nothing has changed'}"
        if moved:
            text += f"; judged from now on: {', '.join(f'{camera} by {key}' for camera, key in moved.items())}"
        return text + (f"; needs a restart: {', '.join(cold)}" if cold else "")

    async def _take_up(self, new: Settings) -> dict[str, str]:
        """Returns the cameras that another version judges from now on, with its key."""
        async with self._switching:
            recipes = self._recipes.configured(new)
            thresholds = {}
            for name, recipe in recipes.items():
                if self._settings.recipes.get(name) != new.recipes[name]:
                    table = recipe.recipe.model_dump(mode="json")
                    thresholds[recipe.key] = await self._worker.add_recipe(recipe.key, table)
            # Nothing can be refused from here on.
            before = {camera: self._recipes.of(camera).key for camera in self._recipes.status()}
            to_keep = self._recipes.take_up(recipes, {camera.name: camera.recipe for camera in new.cameras})
            self._recipes.thresholds_are(thresholds)
            self._settings = _with_hot(self._settings, new)
            self._outbox.masks_are(self._settings.publish)
            set_up_logging(new.log, station=self._settings.station)
            await self._outbox.on_journal(self._recipes.keep, list(recipes.values()), to_keep)
            now = {camera: self._recipes.of(camera).key for camera in before}
            return {camera: key for camera, key in now.items() if key != before[camera]}


def _changes(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Dotted keys whose values differ; cameras are called by their names."""
    if key == "cameras":
        old, new = ({camera["name"]: camera for camera in cameras} for cameras in (old, new))
        if old.keys() != new.keys():
            yield key  # some were added or removed
        old, new = ({name: camera for name, camera in one.items() if name in old and name in new} for one in (old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in old.keys() | new.keys():
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key


def _is_hot(key: str) -> bool:
    parts = key.split(".")
    return any(
        len(parts) >= len(hot) and all(name in ("*", part) for name, part in zip(hot, parts, strict=False))
        for hot in (key.split(".") for key in HOT)
    )


def _with_hot(old: Settings, new: Settings) -> Settings:
    """The settings that hold after a reload: the new ones where they are hot, the old ones elsewhere."""
    for key in HOT:
        old = _taken_over(old, new, key.split("."))
    return old


def _taken_over(old: Any, new: Any, path: list[str]) -> Any:
    """`old` with what `new` has at the path; `*` goes to each camera of `old` that `new` has too."""
    if not path:
        return new
    name, *below = path
    if name == "*":
        named = {camera.name: camera for camera in new}
        return tuple(_taken_over(camera, named.get(camera.name, camera), below) for camera in old)
    return old.model_copy(update={name: _taken_over(getattr(old, name), getattr(new, name), below)})
