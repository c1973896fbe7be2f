"""Which recipe judges which camera: versions, switches between two frames, and what a restart takes up again."""

import json
import re
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from flawline.agent.journal import Journal
from flawline.agent.verdict import ActiveRecipe
from flawline.agent.wire import Header
from flawline.config.errors import ConfigError, JournalError
from flawline.config.memory_versions import stored_sha256
from flawline.config.recipe import PRECISION_OF, Precision, Recipe
from flawline.config.settings import Settings
from flawline.config.sources import explain

log = structlog.get_logger()
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_KEPT = 64  # contents, the last used ones, beside those that are configured, active or owed a verdict
_FLOOR = ""  # the name of a row of the journal's recipes that holds a number and no content
_LIST_BYTES = 4e6  # of contents in one reply to `recipe.list`
_IN_USE = (  # of the journal's recipes
    "SELECT id, version FROM active UNION SELECT recipe, recipe_version FROM triggers"
    " UNION SELECT substr(base, 1, instr(base, '@') - 1), CAST(substr(base, instr(base, '@') + 1) AS INTEGER)"
    " FROM active"
)


class RecipeBook:
    """The recipes that this station has seen lately, in every version, and the active one of each camera.

    A version that is forgotten (see `_MOST_KEPT`) leaves its number taken. A content keeps its version over restarts:
    the configuration's recipe gets a new one only where it has changed. An activation holds over a restart until the
    configuration says something new for that camera. Where it is what the configuration says for a recipe's own name,
    the camera follows the configuration when that changes; a content of its own stays.
    Called on the event loop, but for `keep`, which writes to the journal and belongs to its thread.
    """

    def __init__(self, settings: Settings, journal: Journal) -> None:
        self._versions: dict[str, ActiveRecipe] = {}
        # What judges, once it is known: the bundle's name and hash, and the precision.
        self._models: tuple[str, str | None, Precision | None] | None = None
        self._warned: set[tuple[str, str | None, Precision | None]] = set()  # (key, the bundle's hash, the precision)
        self._newest: dict[str, int] = {}
        self._floor = 0  # no name begins below this: forgotten versions of names had numbers up to it
        self._forgotten: deque[tuple[str, int]] = deque()  # and still in the journal
        self._journal = journal
        unusable = self._read(settings)
        configured = self.configured(settings)
        for active in configured.values():
            self._register(active)
        self._configured = {active.key for active in configured.values()}
        self._base = {camera.name: configured[camera.recipe].key for camera in settings.cameras}
        self._active = {camera.name: configured[camera.recipe] for camera in settings.cameras}
        self._follows: set[str] = set()  # cameras judged by what the configuration says for their recipe's name
        noted: dict[str, tuple[str, bool]] = {}
        for camera, name, version, base, follows in journal.query(
            "SELECT camera, id, version, base, follows FROM active"
        ):
            key = f"{name}@{version}"
            if self._base.get(camera) != base:
                continue
            if follows and name in configured:
                self._active[camera] = configured[name]
            elif key in self._versions:
                self._active[camera] = self._versions[key]
            elif key in unusable:
                instead = self._active[camera].key
                log.error("recipe_not_active_any_more", camera=camera, recipe=key, by=instead, error=unusable[key])
                continue
            noted[camera] = key, bool(follows)
            now = self._active[camera].key
            if now == key:
                log.info("recipe_still_active", camera=camera, recipe=key)
            else:
                log.info("recipe_follows_configuration", camera=camera, recipe=now, before=key)
        self._note_who_follows()
        changed = [
            camera
            for camera, (key, follows) in noted.items()
            if (self._active[camera].key, camera in self._follows) != (key, follows)
        ]
        self._forget()
        self.keep(configured.values(), changed)

    def _read(self, settings: Settings) -> dict[str, str]:
        """What the journal has, one content after the other; of old ones only what may be needed. Returns by their
        keys what is wrong with those that cannot be used."""
        unusable: dict[str, str] = {}
        journalled = self._journal.query("SELECT id, version FROM recipes ORDER BY t DESC, version DESC")
        in_use = {(str(name), int(version)) for name, version in self._journal.query(_IN_USE)}
        found = []
        for name, version in journalled:
            self._newest[name] = max(self._newest.get(name, 0), version)
        self._floor = self._newest.pop(_FLOOR, 0)
        for age, (name, version) in enumerate(journalled):
            if name == _FLOOR:
                continue
            ((sha256, text),) = self._journal.query(
                "SELECT sha256, content FROM recipes WHERE id = ? AND version = ?", (name, version)
            )
            try:
                recipe = Recipe.model_validate_json(text)
                if age >= _MOST_KEPT and (name, version) not in in_use and settings.recipes.get(name) != recipe:
                    self._let_go(name, version)
                    continue
                found.append(ActiveRecipe(name, version, recipe, sha256, recipe.threshold, _memory_sha256(recipe)))
            except (ValidationError, ConfigError) as error:  # of an older flawline, or its memory is gone
                if age < _MOST_KEPT or (name, version) in in_use:
                    unusable[f"{name}@{version}"] = str(error)  # the number stays taken
                else:
                    self._let_go(name, version)
        self._versions = {known.key: known for known in reversed(found)}
        return unusable

    def _forget(self) -> None:
        """Let go of the contents that were not used for longest. The number of none is given again."""
        needed = self._configured | set(self._base.values()) | {active.key for active in self._active.values()}
        spare = [known for key, known in self._versions.items() if key not in needed]
        for known in spare[: max(0, len(spare) - _MOST_KEPT)]:
            del self._versions[known.key]
            self._let_go(known.id, known.version)
        self._warned = {warned for warned in self._warned if warned[0] in self._versions}

    def _let_go(self, name: str, version: int) -> None:
        self._forgotten.append((name, version))
        if version == self._newest[name]:
            self._floor = max(self._floor, version)

    def version_of(self, name: str, recipe: Recipe, memory_sha256: str | None = None) -> ActiveRecipe:
        """The version with this content: one that is known, or the next number, which only `activate` takes.

        Without `memory_sha256` the head of the recipe's memory is read here.
        """
        sha256 = recipe.sha256()
        for known in self._of_name(name):
            # Not by its hash alone: a key that a newer flawline knows, left out, is no other content.
            if known.sha256 == sha256 or known.recipe == recipe:
                return known
        version = max(self._newest.get(name, 0), self._floor) + 1
        memory_sha256 = memory_sha256 or _memory_sha256(recipe)
        return ActiveRecipe(name, version, recipe, sha256, recipe.threshold, memory_sha256)

    def memory_known(self, memory: str) -> str | None:
        """The hash of a memory that a version names; None where none does."""
        return next((one.memory_sha256 for one in self._versions.values() if one.recipe.memory == memory), None)

    def _of_name(self, name: str) -> Iterable[ActiveRecipe]:
        """The newest version first."""
        return sorted((one for one in self._versions.values() if one.id == name), key=lambda one: -one.version)

    def _register(self, recipe: ActiveRecipe) -> None:
        self._versions.pop(recipe.key, None)  # the last used one stands last
        self._versions[recipe.key] = recipe
        self._newest[recipe.id] = max(self._newest.get(recipe.id, 0), recipe.version)

    def _note_who_follows(self) -> None:
        self._follows |= {camera for camera, active in self._active.items() if active.key in self._configured}

    def find(self, name: str, version: int | None = None) -> ActiveRecipe:
        """A version, the newest where none is named. Raises ConfigError with the names that there are."""
        found = next((one for one in self._of_name(name) if version in (None, one.version)), None)
        if found is None:
            there = ", ".join(sorted(self._versions))
            raise ConfigError(f"recipe: there is no {name!r}{f' version {version}' if version else ''} ({there})")
        return found

    def known(self, key: str) -> ActiveRecipe | None:
        """By the key that the worker and the journal use."""
        return self._versions.get(key)

    def read(self, name: str, table: dict[str, Any]) -> Recipe:
        """A recipe from outside. Raises ConfigError naming the key that is wrong."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"recipe: the name {name!r} must match [A-Za-z0-9_-]+")
        try:
            return Recipe.model_validate(table)
        except ValidationError as error:
            raise ConfigError(explain(error, Recipe, f"recipe {name}", [])) from error

    def of(self, camera: str) -> ActiveRecipe:
        """The one that judges the next frame of a camera."""
        return self._active[camera]

    def activate(self, cameras: Iterable[str], recipe: ActiveRecipe) -> None:
        """From the next frame on. The worker knows the recipe already."""
        self._register(recipe)
        for camera in cameras:
            self._active[camera] = recipe
            self._follows.discard(camera)
        self._note_who_follows()
        self._warn()
        self._forget()

    def configured(self, settings: Settings) -> dict[str, ActiveRecipe]:
        """The versions of a configuration's recipes, by name. Nothing changes until they are taken up."""
        return {name: self.version_of(name, content) for name, content in settings.recipes.items()}

    def take_up(self, configured: Mapping[str, ActiveRecipe], recipe_of: Mapping[str, str]) -> list[str]:
        """A changed configuration holds from the next frame on; the worker knows its recipes already.

        `recipe_of` names each camera's recipe. Where it says something new for that one, what was activated by command
        gives way; where it does for the recipe that was activated, its new version takes the place, as it would at a
        restart. Returns the cameras to `keep`.
        """
        for recipe in configured.values():
            self._register(recipe)
        self._configured = {recipe.key for recipe in configured.values()}
        before = {camera: (active.key, camera in self._follows) for camera, active in self._active.items()}
        moved = {
            camera: configured[name]
            for camera, name in recipe_of.items()
            if camera in self._base and self._base[camera] != configured[name].key
        }
        for camera, active in self._active.items():
            if camera in moved:
                self._base[camera] = moved[camera].key
                self._active[camera] = moved[camera]
            elif camera in self._follows:
                self._active[camera] = configured.get(active.id, active)
        self._note_who_follows()
        self._warn()
        self._forget()
        return [
            camera
            for camera, active in self._active.items()
            if camera in moved or (active.key, camera in self._follows) != before[camera]
        ]

    def keep(self, recipes: Iterable[ActiveRecipe], cameras: Iterable[str] = ()) -> None:
        """On the journal's thread: remember versions and the active one of these cameras. A full disk is said."""
        try:
            for recipe in recipes:
                self._journal.query(
                    "INSERT OR IGNORE INTO recipes VALUES (?, ?, ?, ?, ?)",
                    (recipe.id, recipe.version, recipe.sha256, recipe.recipe.model_dump_json(), time.time_ns()),
                )
            for camera in cameras:
                active = self._active[camera]
                self._journal.query(
                    "INSERT OR REPLACE INTO active (camera, id, version, base, follows) VALUES (?, ?, ?, ?, ?)",
                    (camera, active.id, active.version, self._base[camera], camera in self._follows),
                )
            self._keep_no_more()
        except JournalError as error:
            log.error("recipe_not_kept", error=str(error))

    def _keep_no_more(self) -> None:
        floor = self._floor
        if self._forgotten and floor:
            self._journal.query("INSERT OR IGNORE INTO recipes VALUES (?, ?, '', '', 0)", (_FLOOR, floor))
            self._journal.query("DELETE FROM recipes WHERE id = ? AND version < ?", (_FLOOR, floor))
        while self._forgotten:
            name, version = self._forgotten[0]
            if f"{name}@{version}" not in self._versions:
                self._journal.query(
                    f"DELETE FROM recipes WHERE id = ? AND version = ? AND (id, version) NOT IN ({_IN_USE})",
                    (name, version),
                )
            self._forgotten.popleft()

    def for_worker(self) -> dict[str, dict[str, Any]]:
        """What a worker must know from its start: what is configured, and what is active.

        Not all that this station has ever seen: the journal also holds recipes that fit other models.
        """
        wanted = self._configured | {active.key for active in self._active.values()}
        return {key: self._versions[key].recipe.model_dump(mode="json") for key in sorted(wanted)}

    def judged_by(self, bundle: str, bundle_sha256: str | None, precision: str | None) -> None:
        """The models that the worker has loaded; `precision` as the worker names it, `float32`."""
        self._models = bundle, bundle_sha256, PRECISION_OF.get(precision or "")
        self._warn()

    def _warn(self) -> None:
        """Say, once for each recipe that comes into use, that its threshold was calibrated for something else."""
        if self._models is None:
            return
        bundle, sha256, precision = self._models
        for active in self._active.values():
            warning = active.recipe.calibration_warning(bundle, sha256, active.memory_sha256, precision)
            if warning is not None and (active.key, sha256, precision) not in self._warned:
                self._warned.add((active.key, sha256, precision))
                log.warning("calibration_does_not_hold", recipe=active.key, reason=f"{active.key}: {warning}")

    def thresholds_are(self, thresholds: dict[str, float]) -> None:
        """What the worker decides by, per key: the recipe's own threshold, or its bundle's."""
        for key, threshold in thresholds.items():
            if key in self._versions:
                self._versions[key] = replace(self._versions[key], threshold=threshold)
        self._active = {camera: self._versions[active.key] for camera, active in self._active.items()}

    def list(self) -> Header:
        """For `recipe.list`: every version, and which cameras it judges. Of more than a reply may hold those in use,
        and the last used ones."""
        in_use = self._configured | {active.key for active in self._active.values()}
        listed, size = [], 0
        ages = {key: age for age, key in enumerate(reversed(self._versions))}
        for known in sorted(self._versions.values(), key=lambda known: (known.key not in in_use, ages[known.key])):
            text = known.recipe.model_dump_json()
            size += len(text)
            if size > _LIST_BYTES:
                break
            entry = {
                "id": known.id,
                "version": known.version,
                "sha256": known.sha256,
                "threshold": known.threshold,
                "cameras": [camera for camera, active in self._active.items() if active.key == known.key],
                "recipe": json.loads(text),
            }
            listed.append(entry)
        listed.sort(key=lambda entry: (entry["id"], entry["version"]))
        return {"recipes": listed, "left_out": len(self._versions) - len(listed)}

    def status(self) -> Header:
        """For the status message: what judges each camera."""
        return {camera: {"id": active.id, "version": active.version} for camera, active in self._active.items()}


def _memory_sha256(recipe: Recipe) -> str | None:
    return None if recipe.memory is None else stored_sha256(Path(recipe.memory))
