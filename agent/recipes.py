"""Which recipe judges which camera: versions, switches between two frames, and what a restart takes up again."""

import json
import re
import time
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


class RecipeBook:
    """Every version of every recipe that this station has seen, and the active one of each camera.

    A content keeps its version over restarts: the configuration's recipe gets a new one only where it has changed.
    An activation holds over a restart until the configuration says something new for that camera. Where it is what the
    configuration says for a recipe's own name, the camera follows the configuration when that changes; a content of its
    own stays.
    Called on the event loop, but for `keep`, which writes to the journal and belongs to its thread.
    """

    def __init__(self, settings: Settings, journal: Journal) -> None:
        self._versions: dict[str, ActiveRecipe] = {}
        # What judges, once it is known: the bundle's name and hash, and the precision.
        self._models: tuple[str, str | None, Precision | None] | None = None
        self._warned: set[tuple[str, str | None, Precision | None]] = set()  # (key, the bundle's hash, the precision)
        self._newest: dict[str, int] = {}
        unusable: dict[str, str] = {}
        for name, version, sha256, text in journal.query(
            "SELECT id, version, sha256, content FROM recipes ORDER BY id, version"
        ):
            self._newest[name] = version
            try:
                recipe = Recipe.model_validate_json(text)
                known = ActiveRecipe(name, version, recipe, sha256, recipe.threshold, _memory_sha256(recipe))
            except (ValidationError, ConfigError) as error:  # of an older flawline, or its memory is gone
                unusable[f"{name}@{version}"] = str(error)  # the number stays taken
                continue
            self._versions[known.key] = known
        self._journal = journal
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
        self.keep(configured.values(), changed)

    def version_of(self, name: str, recipe: Recipe) -> ActiveRecipe:
        """The version with this content: one that is known, or the next number, which only `activate` takes."""
        sha256 = recipe.sha256()
        newest = self._newest.get(name, 0)
        for version in range(newest, 0, -1):
            known = self._versions.get(f"{name}@{version}")
            # Not by its hash alone: a key that a newer flawline knows, left out, is no other content.
            if known is not None and (known.sha256 == sha256 or known.recipe == recipe):
                return known
        return ActiveRecipe(name, newest + 1, recipe, sha256, recipe.threshold, _memory_sha256(recipe))

    def _register(self, recipe: ActiveRecipe) -> None:
        self._versions[recipe.key] = recipe
        self._newest[recipe.id] = max(self._newest.get(recipe.id, 0), recipe.version)

    def _note_who_follows(self) -> None:
        self._follows |= {camera for camera, active in self._active.items() if active.key in self._configured}

    def find(self, name: str, version: int | None = None) -> ActiveRecipe:
        """A version, the newest where none is named. Raises ConfigError with the names that there are."""
        found = self._versions.get(f"{name}@{self._newest.get(name, 0) if version is None else version}")
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
        except JournalError as error:
            log.error("recipe_not_kept", error=str(error))

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

    def list(self) -> list[Header]:
        """For `recipe.list`: every version, and which cameras it judges."""
        return [
            {
                "id": known.id,
                "version": known.version,
                "sha256": known.sha256,
                "threshold": known.threshold,
                "cameras": [camera for camera, active in self._active.items() if active.key == known.key],
                "recipe": json.loads(known.recipe.model_dump_json()),
            }
            for known in self._versions.values()
        ]

    def status(self) -> Header:
        """For the status message: what judges each camera."""
        return {camera: {"id": active.id, "version": active.version} for camera, active in self._active.items()}


def _memory_sha256(recipe: Recipe) -> str | None:
    return None if recipe.memory is None else stored_sha256(Path(recipe.memory))
