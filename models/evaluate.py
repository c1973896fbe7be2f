"""Evaluation: one pass over the pictures of each class, every row of the study judged from one encoding.

Reading ahead, judging, and scoring run at the same time; maps go to disk (`map_store`), metrics are taken class
by class (`class_report`). An interrupted run goes on where it was, from `OUT/.work`.
"""

import fcntl
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flawline.config.errors import ConfigError, FlawlineError, ImageError
from flawline.config.recipe import Recipe
from flawline.models.class_report import ClassTruth, class_report
from flawline.models.contact_sheet import Cell, write_sheet
from flawline.models.datasets import Category, Sample
from flawline.models.decide import image_score
from flawline.models.ground_truth import read_rgb, truth
from flawline.models.map_store import Judged, MapStore
from flawline.models.row_maps import RowMap
from flawline.models.study import AGENT, Row

AHEAD = 4  # pictures read, and pictures being scored, at one time
ON_SHEET = 5

Picture = NDArray[np.uint8]
Judge = Callable[[Picture], dict[str, RowMap]]


class Progress(Protocol):
    """Told what is going on."""

    def start(self, total: int, already: int) -> None:
        """So many pictures in all, and so many of them judged by an earlier run."""

    def step(self, category: str) -> None:
        """One more picture is judged."""

    def say(self, text: str) -> None:
        """One line of what else happens."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and where the results go."""

    categories: Sequence[Category]
    rows: Sequence[Row]  # those that run
    recipes: dict[str, Recipe]  # by category
    size: int | None  # edge of the metrics' square frame; None: captured frames
    out: Path
    identity: str  # of the models, their arithmetic and the program
    seed: int = 0

    def signature(self, category: Category) -> str:
        """Changes with everything that the maps of a class depend on."""
        known = [
            self.identity,
            self.size,
            self.seed,
            [(row.key, row.recipe(self.recipes[category.name]).model_dump(mode="json")) for row in self.rows],
            stamps(category),
        ]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def stamps(category: Category, more: Sequence[Path] = ()) -> list[tuple[str, int, int]]:
    """Name, size and time of a class's test files, and of others: whether they are those of before."""
    files = [sample.image for sample in category.test] + [s.mask for s in category.test if s.mask is not None]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in (*files, *more)]


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say where it was when the disk is full or nothing may be written. Raises FlawlineError."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise FlawlineError(f"--out {out}: {where}: cannot be written: {error.strerror or error}") from error


def work_folder(out: Path) -> Path:
    """Where a run keeps what the next one goes on from."""
    return out / ".work"


class Evaluation:
    """Runs a plan. `judge_for` gives, for a class, what turns pictures into maps: locally, or over a cluster."""

    def __init__(
        self,
        plan: Plan,
        judge_for: Callable[[Category], Callable[[Iterable[Sample]], Iterator[Judged]]],
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._judge_for = judge_for
        self._progress = progress
        self._work = work_folder(plan.out)

    def run(self, *, keep_maps: bool = False) -> dict[str, dict[str, Any]]:
        """Reports by class and row key. Raises ImageError, FlawlineError."""
        with writing(self._plan.out), self._alone():
            return self._run(keep_maps)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold OUT for this run: two that write the same maps would spoil both."""
        out = self._plan.out
        (out / "plots").mkdir(parents=True, exist_ok=True)
        self._work.mkdir(exist_ok=True)
        with (self._work / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"--out {out}: another evaluation is writing there") from error
            yield

    def _run(self, keep_maps: bool) -> dict[str, dict[str, Any]]:
        plan = self._plan
        finished = {category.name: self._finished(category) for category in plan.categories}
        stores = {
            category.name: self._store(category) for category in plan.categories if finished[category.name] is None
        }
        total = sum(len(category.test) for category in plan.categories)
        left = sum(
            len(category.test) - len(stores[category.name]) for category in plan.categories if category.name in stores
        )
        self._progress.start(total, total - left)
        reports: dict[str, dict[str, Any]] = {}
        for category in plan.categories:
            report = finished[category.name]
            if report is None:
                report = self._evaluate(category, stores[category.name])
            reports[category.name] = report
            if not keep_maps:
                shutil.rmtree(self._work / category.name, ignore_errors=True)
        return reports

    def clean_up(self) -> None:
        """Remove what an interrupted run would go on from; call it when the results are written."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _report_file(self, category: Category) -> Path:
        return self._work / f"{category.name}.json"

    def _finished(self, category: Category) -> dict[str, Any] | None:
        try:
            stored = json.loads(self._report_file(category).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = stored.get("signature") == self._plan.signature(category)
        rows: dict[str, Any] | None = stored["rows"] if same else None
        return rows

    def _store(self, category: Category) -> MapStore:
        keys = [row.key for row in self._plan.rows]
        return MapStore(self._work / category.name, keys, self._plan.signature(category))

    def _evaluate(self, category: Category, store: MapStore) -> dict[str, Any]:
        remaining = category.test[len(store) :]
        if remaining:
            judge = self._judge_for(category)
            for sample, judged in zip(remaining, judge(remaining), strict=True):
                store.append(sample.image, judged)
                self._progress.step(category.name)
        self._progress.say(f"{category.name}: metrics of {len(category.test)} pictures")
        known = self._truth(category, store)
        reports = {row.key: class_report(store, row.key, known, seed=self._plan.seed) for row in self._plan.rows}
        self._sheet(category, store, known, reports[AGENT.key])
        content = json.dumps({"signature": self._plan.signature(category), "rows": reports})
        self._report_file(category).write_text(content, encoding="utf-8")
        return reports

    def _truth(self, category: Category, store: MapStore) -> ClassTruth:
        """Masks at the size of the stored maps."""
        masks = []
        for sample, line in zip(category.test, store.lines, strict=True):
            height, width = line["shape"]
            masks.append(truth(sample, (height, width), (height, width)))
        return ClassTruth.of(category, masks)

    def _sheet(self, category: Category, store: MapStore, known: ClassTruth, report: dict[str, Any]) -> None:
        """Best and worst by the overlap of mask and map at the class's best threshold, else by image score."""
        threshold = report["pixel_threshold"] if report["pixel_threshold"] is not None else report["image_threshold"]
        threshold = 0.5 if threshold is None else threshold
        masks = dict(zip(known.with_pixels, known.masks, strict=True))
        scores = store.scores(AGENT.key)
        quality = [(score if defective else -score) for score, defective in zip(scores, known.defective, strict=True)]
        ranked = [number for number in range(len(scores)) if number in masks and masks[number].any()]
        if ranked:
            for number, anomaly_map in zip(ranked, store.maps(AGENT.key, ranked), strict=True):
                quality[number] = _overlap(anomaly_map >= threshold, masks[number])
        else:
            ranked = list(range(len(scores)))
        ranked.sort(key=lambda number: -quality[number])
        best = ranked[: min(ON_SHEET, (len(ranked) + 1) // 2)]
        worst = ranked[len(best) :][::-1][:ON_SHEET]
        cells = []
        for number in (*best, *worst):
            sample = category.test[number]
            (anomaly_map,) = store.maps(AGENT.key, [number])
            caption = f"{sample.defect}/{sample.image.name}  score {scores[number]:.3f}"
            if number in masks and masks[number].any():
                caption += f"  IoU {quality[number]:.2f}"
            cells.append(Cell(caption, read_rgb(sample.image), masks.get(number), anomaly_map))
        path = self._plan.out / "plots" / f"{category.name}_contact_sheet.png"
        write_sheet(path, cells[: len(best)], cells[len(best) :], threshold)


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    either = int((a | b).sum())
    return float((a & b).sum() / either) if either else 0.0


def judge_locally(judge: Judge, samples: Iterable[Sample], min_area: int) -> Iterator[Judged]:
    """Read ahead in threads, judge in this one, take image scores in threads; results in order, waits bounded."""
    with ThreadPoolExecutor(AHEAD, "evaluate") as pool:
        reading: deque[tuple[Sample, Future[Picture]]] = deque()
        scoring: deque[Future[Judged]] = deque()
        waiting = iter(samples)
        try:
            while True:
                while len(reading) < AHEAD and (sample := next(waiting, None)) is not None:
                    reading.append((sample, pool.submit(read_rgb, sample.image)))
                if not reading:
                    break
                sample, picture = reading.popleft()
                try:
                    maps = judge(picture.result())
                except ImageError as error:
                    named = str(error).startswith(str(sample.image))
                    raise error if named else ImageError(f"{sample.image}: {error}") from error
                scoring.append(pool.submit(score, maps, min_area))
                if len(scoring) >= AHEAD:
                    yield scoring.popleft().result()
            while scoring:
                yield scoring.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def score(maps: dict[str, RowMap], min_area: int) -> Judged:
    """The image score of every row: the largest threshold at which its map shows a defect."""
    return Judged(
        {key: row.at_size for key, row in maps.items()},
        {key: image_score(row.in_frame, min_area) for key, row in maps.items()},
        {key: row.stage_ms for key, row in maps.items()},
    )


def subset(category: Category, limit: int) -> Category:
    """At most `limit` good and `limit` defective pictures, spread evenly over the class."""
    chosen: list[Sample] = []
    for defective in (False, True):
        group = [sample for sample in category.test if sample.defective is defective]
        places = np.linspace(0, len(group) - 1, min(limit, len(group))).astype(int)
        chosen += [group[place] for place in places.tolist()]
    return Category(category.name, tuple(chosen), category.train_good, category.problems, category.with_masks)
