"""The scores of a running line: its newest verdicts by one recipe, and the content of the version that gave them."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from flawline.agent.control import ask
from flawline.agent.wire import Header
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.recipe import Recipe
from flawline.config.sources import explain

AT_ONCE = 500  # verdicts asked for in one request


@dataclass(frozen=True)
class Scores:
    """Scores of good parts, and what gave them: bundle, recipe, and the memory where it has one."""

    scores: list[float]
    bundle: str
    bundle_sha256: str
    recipe: Recipe
    memory_sha256: str | None = None


def scores_of_line(endpoint: str, recipe: str, count: int, keys: tuple[Path, Path] | None) -> Scores:
    """The scores of the newest verdicts of a running agent by this recipe, at most `count`.

    Only completed inspections count, and only those by the recipe's newest version and the newest bundle: older
    scores say nothing of what will come. Raises ConfigError where nobody answers or no part was judged by the recipe,
    FlawlineError on a refusal.
    """
    scores: list[float] = []
    version = bundle = sha256 = memory = None
    upper: int | None = None
    try:
        while len(scores) < count and (upper is None or upper >= 1):
            request = {"cmd": "replay", "id": 1, "from_seq": 1, "to_seq": upper, "limit": 1}
            if upper is None:
                upper = int(ask(endpoint, request, keys=keys)["last_seq"])
            lower = max(1, upper - AT_ONCE + 1)
            verdicts, start, done = [], lower, False
            while not done and start <= upper:
                reply = ask(endpoint, {"cmd": "replay", "id": 1, "from_seq": start, "to_seq": upper}, keys=keys)
                verdicts += reply["verdicts"]
                start, done = int(reply["next_seq"]), bool(reply["done"])
            for verdict in reversed(verdicts):
                if verdict["recipe"]["id"] != recipe or verdict["result"] == "error" or verdict["degraded"]:
                    continue
                provenance = verdict["provenance"]
                if version is None:
                    version = verdict["recipe"]["version"]
                    bundle, sha256 = provenance["bundle"], provenance["bundle_sha256"]
                    memory = provenance.get("memory_sha256")
                if (verdict["recipe"]["version"], provenance["bundle_sha256"]) != (version, sha256):
                    upper = 0
                    break
                scores.append(float(verdict["score"]))
                if len(scores) == count:
                    break
            upper = min(upper, lower - 1)
        if version is None:
            raise ConfigError(f"--last: the line has judged no part by recipe {recipe!r} yet")
        known = ask(endpoint, {"cmd": "recipe.list", "id": 1}, keys=keys)["recipes"]
    except ValueError as error:
        raise FlawlineError(f"--endpoint {endpoint}: the agent refuses: {error}") from error
    return Scores(scores, str(bundle), str(sha256), _content(known, recipe, int(version)), memory)


def _content(known: list[Header], recipe: str, version: int) -> Recipe:
    """Of the very version that gave the scores: the file may say something else by now, or have said it never."""
    for one in known:
        if (one["id"], one["version"]) == (recipe, version):
            try:
                return Recipe.model_validate(one["recipe"])
            except ValidationError as error:
                where = f"--last: recipe {recipe}@{version} of the line"
                raise ConfigError(explain(error, Recipe, where, [])) from error
    raise ConfigError(
        f"--last: the line does not know recipe {recipe!r} version {version} any more, which its newest verdicts are by"
    )
