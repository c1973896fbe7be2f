"""Learning from false rejects: teach a memory the parts that operators marked, and judge the archive by both memories.

Offline, beside a running agent: the journal and the archive are read, only the new memory's file is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flawline.agent.archive import kept_pictures
from flawline.agent.feedback import Mark, reading
from flawline.agent.progress import WorkProgress
from flawline.agent.station_folder import PICTURES, station_folder
from flawline.config.errors import ConfigError, FlawlineError, ImageError
from flawline.config.memory_versions import is_numbered, pending_file
from flawline.config.recipe import Recipe
from flawline.config.settings import Settings

if TYPE_CHECKING:  # the models, and torch with them, are loaded when there is something to learn
    from flawline.models.inspector import Inspector
    from flawline.models.memory_learn import Learnt

GROUPS = {
    "wrong_rejects": "rejects marked as wrong",
    "confirmed_defects": "confirmed defects",
    "other_rejects": "other rejects",
    "good_parts": "passed parts",
}


@dataclass(frozen=True)
class Part:
    """One reject that an operator marked as wrong, and what becomes of it."""

    mark: Mark
    picture: Path | None
    use: str  # learnt, known, duplicate, outlier; gone, refused
    reason: str = ""  # of the last two
    distance: float | None = None  # its largest, to what was remembered
    typical: float | None = None


@dataclass(frozen=True)
class Twice:
    """One archived part, judged by the memory before and by the new one."""

    seq: int
    camera: str
    group: str  # a key of GROUPS
    picture: Path
    score_before: float
    score_after: float
    passed_before: bool
    passed_after: bool


@dataclass(frozen=True)
class Report:
    """What was learnt, and what it would change."""

    recipe: Recipe  # as it judges now
    version: int | None  # of it, where it was activated by command
    parts: list[Part]
    memory: Path | None  # not active yet; None where there is nothing new in the parts
    memory_sha256: str | None
    memory_before_sha256: str | None
    remembered: int  # good parts in the new memory
    judged: list[Twice]
    not_judged: list[str]  # pictures and why
    unchecked: list[Mark]  # confirmed defects whose picture is gone

    @property
    def let_through(self) -> list[Twice]:
        """Confirmed defects that are rejected now and would pass."""
        return [
            one
            for one in self.judged
            if one.group == "confirmed_defects" and one.passed_after and not one.passed_before
        ]


@dataclass(frozen=True)
class _Given:
    """What the journal and the archive hold for one recipe."""

    recipe: Recipe
    version: int | None
    marks: dict[int, Mark]
    pictures: dict[int, Path]  # of its parts
    groups: dict[int, str]  # of these
    cameras: dict[int, str]


def teach_from_feedback(
    settings: Settings,
    name: str,
    folder: Path,
    *,
    keep_all: bool = False,
    compare: int = 500,
    bundle: str | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Report:
    """Write the new memory of recipe `name`, which does not judge yet, and judge the archive by both.

    It goes beside the memory before it, or into `folder`. Of archived parts without a mark, the newest `compare` are
    judged. Raises ConfigError where no reject is marked as wrong or the memory belongs to another bundle,
    FlawlineError where none of the pictures is kept.
    """
    given = _gather(settings, name)
    marked = [mark for mark in given.marks.values() if mark.wrong_reject]
    if not marked:
        others = f"; {len(given.marks)} marks on its verdicts say something else" if given.marks else ""
        raise ConfigError(
            f"no reject of recipe {name!r} is marked as wrong (`flawline feedback SEQ --good --who NAME`){others}"
        )
    gone = f"its picture is not kept (journal.archive = {settings.journal.archive!r}, archive_mb = "
    gone += f"{settings.journal.archive_mb:g}: the oldest go first)"
    parts = [
        Part(mark, given.pictures.get(mark.seq), "" if mark.seq in given.pictures else "gone", gone) for mark in marked
    ]
    if all(part.use == "gone" for part in parts):
        numbers = ", ".join(str(mark.seq) for mark in marked[:20])
        archive = station_folder(settings) / PICTURES
        raise FlawlineError(f"{archive}: of no reject that is marked as wrong ({numbers}) the picture is there: {gone}")
    from flawline.models.inspector import Inspector

    model = settings.model
    inspector = Inspector.load(
        bundle or model.bundle, device or model.device, precision or model.precision, given.recipe
    )
    with WorkProgress("learn") as progress:
        unmarked = [seq for seq in given.pictures if seq not in given.marks]
        chosen = sorted([*unmarked[max(len(unmarked) - compare, 0) :], *(given.pictures.keys() & given.marks.keys())])
        progress.start(len(parts) + len(chosen))
        parts, learnt = _learn(inspector, name, given.recipe, parts, keep_all, progress)
        before = inspector.prepare(given.recipe).memory
        path: Path | None = None
        judged: list[Twice] = []
        not_judged: list[str] = []
        if learnt is not None:
            from flawline.models.memory_file import write_memory

            current = None if given.recipe.memory is None else Path(given.recipe.memory)
            path = pending_file(
                current.parent if current is not None and is_numbered(current) else folder, name, learnt.memory.sha256
            )
            write_memory(path, learnt.memory)
            for older in path.parent.glob(f"{name}.pending.*.safetensors"):
                if older != path:
                    older.unlink(missing_ok=True)
            judged, not_judged = _judge_twice(inspector, given, path, chosen, progress)
    return Report(
        given.recipe,
        given.version,
        parts,
        path,
        learnt.memory.sha256 if learnt is not None else None,
        before.sha256 if before is not None else None,
        learnt.memory.about.pictures if learnt is not None else 0,
        judged,
        not_judged,
        [mark for mark in given.marks.values() if not mark.good and mark.seq not in given.pictures],
    )


def _gather(settings: Settings, name: str) -> _Given:
    station = station_folder(settings)
    pictures = kept_pictures(station / PICTURES)
    with reading(station) as record:
        recipe, version = record.judging(name, settings.recipes)
        marks = {mark.seq: mark for mark in record.marks() if mark.recipe == name}
        headers = record.headers(pictures)
    own = {seq: header for seq, header in headers.items() if header["recipe"]["id"] == name}
    groups = {}
    for seq, header in own.items():
        mark, rejected = marks.get(seq), header["result"] == "fail"
        if mark is not None and not mark.good:
            groups[seq] = "confirmed_defects"
        elif rejected:
            groups[seq] = "other_rejects" if mark is None else "wrong_rejects"
        else:
            groups[seq] = "good_parts"
    return _Given(
        recipe,
        version,
        marks,
        {seq: path for seq, path in pictures.items() if seq in own},
        groups,
        {seq: str(header["camera"]) for seq, header in own.items()},
    )


def _learn(
    inspector: "Inspector", name: str, recipe: Recipe, parts: Sequence[Part], keep_all: bool, progress: WorkProgress
) -> tuple[list[Part], "Learnt | None"]:
    """What becomes of every part; None where none of them brings anything new."""
    from flawline.models.ground_truth import read_rgb
    from flawline.models.memory_learn import Learner
    from flawline.models.memory_teach import teach

    before = inspector.prepare(recipe).memory
    learner = Learner(inspector, name, recipe)
    done, described = list(parts), {}
    for number, part in enumerate(parts):
        progress.step(f"verdict {part.mark.seq}")
        if part.picture is None:
            continue
        try:
            one = learner.describe(read_rgb(part.picture), str(part.mark.seq))
            if before is not None:
                before.check_frame(one.frame)
            else:
                learner.take(one)
        except ImageError as error:
            done[number] = replace(part, use="refused", reason=str(error))
        else:
            described[number] = one
    if not described:
        raise FlawlineError(f"nothing can be learnt: {'; '.join(part.reason for part in done)}")
    learnt = teach(before, list(described.values()), keep_all=keep_all) if before else learner.learn(keep_all=keep_all)
    shown = {one.name: one for one in learnt.pictures}
    for number in described:
        use = shown[str(done[number].mark.seq)]
        done[number] = replace(done[number], use=use.use, reason="", distance=use.distance, typical=use.typical)
    return done, learnt if any(part.use == "learnt" for part in done) else None


def _judge_twice(
    inspector: "Inspector", given: _Given, memory: Path, chosen: Sequence[int], progress: WorkProgress
) -> tuple[list[Twice], list[str]]:
    from flawline.models.ground_truth import read_rgb

    after = given.recipe.model_copy(update={"memory": str(memory)})
    judged, not_judged = [], []
    for seq in chosen:
        path = given.pictures[seq]
        progress.step(f"verdict {seq}")
        try:
            encoded = inspector.encode([read_rgb(path)], given.recipe)
            old, new = (inspector.judge(encoded, recipe)[0] for recipe in (given.recipe, after))
        except ImageError as error:
            not_judged.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        judged.append(
            Twice(seq, given.cameras[seq], given.groups[seq], path, old.score, new.score, old.passed, new.passed)
        )
    return judged, not_judged
