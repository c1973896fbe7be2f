"""The scores of a running line: its newest verdicts by one recipe, and the content of the version that gave them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flawline.agent.control import ask
from flawline.agent.wire import Header
from flawline.config.errors import ConfigError, FlawlineError
from flawline.config.recipe import PRECISION_OF, Precision, Recipe
from flawline.config.sources import explain

AT_ONCE = 500  # verdicts asked for in one request


@dataclass(frozen=True)
class Scores:
    """Scores of good parts, and what gave them: bundle, recipe, the memory where it has one, the precision if known.

    Of a line also the recipe's version, the cameras, those of which verdicts by something else were passed over, and
    how many parts have no score: they stand among the scores as 1.0, a reject at any threshold.
    """

    scores: list[float]
    bundle: str
    bundle_sha256: str
    recipe: Recipe
    memory_sha256: str | None = None
    precision: Precision | None = None
    version: int | None = None
    cameras: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    without_score: int = 0


class Line:
    """A running agent, asked over its control socket. Everything raises NoAnswer where nobody does,
    FlawlineError on a refusal."""

    def __init__(self, endpoint: str, keys: tuple[Path, Path] | None) -> None:
        self._endpoint = endpoint
        self._keys = keys

    def scores(self, recipe: str, count: int, camera: str | None = None) -> Scores:
        """Of the newest verdicts by this recipe, of one camera or of all, at most `count`.

        Only those count by what gave the newest one: a version of the recipe, a bundle, a memory, a precision. Cameras
        may be on different versions, so verdicts by others are passed over, until one of a camera that had to do with
        the wanted one: before it, it was not in use there.

        A part that came too late for its deadline has the score of its late result. Where there is none, or where SAM
        did not fit into the deadline, nobody knows the score: it counts as a reject. Suspicious parts take longest, so
        to leave these out would cut off the upper end. Other errors say nothing of their part.

        Raises ConfigError where there is no part at all.
        """
        if camera is not None:
            there = self._ask("recipe.list")["active"]
            if camera not in there:
                raise ConfigError(f"--camera: there is no {camera!r} (there are: {', '.join(there)})")
        scores: list[float] = []
        without_score = 0
        newest: Header = {}
        cameras: set[str] = set()
        passed_over: set[str] = set()
        for verdict, late in self._newest_first():
            if verdict["recipe"]["id"] != recipe or camera not in (None, verdict["camera"]):
                continue
            if verdict["result"] == "error" and verdict["reason"] != "deadline":
                continue
            if verdict["provenance"]["bundle_sha256"] is None:  # the models were not loaded yet
                continue
            newest = newest or verdict
            if not _judged_alike(verdict, newest):
                if verdict["camera"] in cameras:
                    break
                passed_over.add(verdict["camera"])
                continue
            cameras.add(verdict["camera"])
            result = late or verdict
            known = result["result"] != "error" and not result["degraded"]
            scores.append(float(result["score"]) if known else 1.0)
            without_score += not known
            if len(scores) == count:
                break
        if not newest:
            of = "" if camera is None else f" of camera {camera!r}"
            raise ConfigError(f"--last: the line has judged no part{of} by recipe {recipe!r} yet")
        version, provenance = int(newest["recipe"]["version"]), newest["provenance"]
        return Scores(
            scores,
            str(provenance["bundle"]),
            str(provenance["bundle_sha256"]),
            _content(self._ask("recipe.list")["recipes"], recipe, version),
            provenance.get("memory_sha256"),
            PRECISION_OF.get(provenance.get("precision")),
            version,
            sorted(cameras),
            sorted(passed_over),
            without_score,
        )

    def _newest_first(self) -> Iterator[tuple[Header, Header | None]]:
        """Every verdict of the journal, from the newest back, with the result that came after its deadline."""
        upper = int(self._ask("replay", from_seq=1, limit=1)["last_seq"])
        while upper >= 1:
            lower = max(1, upper - AT_ONCE + 1)
            verdicts, start, done = [], lower, False
            late: dict[int, Header] = {}
            while not done and start <= upper:
                reply = self._ask("replay", from_seq=start, to_seq=upper)
                verdicts += reply["verdicts"]
                late |= {result["seq"]: result for result in reply["late"]}
                start, done = int(reply["next_seq"]), bool(reply["done"])
            yield from ((verdict, late.get(verdict["seq"])) for verdict in reversed(verdicts))
            upper = lower - 1

    def _ask(self, cmd: str, **request: Any) -> Header:
        try:
            return ask(self._endpoint, {"cmd": cmd, "id": 1, **request}, keys=self._keys)
        except ValueError as error:
            raise FlawlineError(f"--endpoint {self._endpoint}: the agent refuses: {error}") from error


def _judged_alike(one: Header, two: Header) -> bool:
    """Whether the same gave both scores, which else lie on different scales.

    An older flawline's verdicts do not say their precision: it counts as that of the others.
    """
    for key in ("bundle_sha256", "memory_sha256"):
        if one["provenance"].get(key) != two["provenance"].get(key):
            return False
    precisions = {header["provenance"].get("precision") for header in (one, two)} - {None}
    return len(precisions) < 2 and one["recipe"]["version"] == two["recipe"]["version"]


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
