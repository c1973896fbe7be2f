"""Progress of long work on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

import click
import rich.console
import rich.progress

LINE_EVERY_S = 10.0


class Progress:
    """The bar on stderr with these columns beside it, or None as `_bar` where stderr is no terminal."""

    def __init__(self, *columns: rich.progress.ProgressColumn, transient: bool = False) -> None:
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                *columns,
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
                transient=transient,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class WorkProgress(Progress):
    """Counts steps of one piece of work and says how long the rest will take. Use it in a `with` block."""

    def __init__(self, title: str) -> None:
        super().__init__(rich.progress.MofNCompleteColumn(), transient=True)
        self._title = title
        self._total = self._done = self._already = 0
        self._started = self._said = time.monotonic()
        self._task: rich.progress.TaskID | None = None

    def start(self, total: int, already: int = 0) -> None:
        """So many steps in all; `already` of them were done by an earlier run."""
        self._total, self._done, self._already = total, already, already
        self._started = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(self._title, total=total, completed=already)
        if already:
            self.say(f"going on from an earlier run: {already} of {total} are done")

    def step(self, text: str) -> None:
        """One more step is done; `text` says of what."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, description=f"{self._title}: {text}")
        elif time.monotonic() - self._said >= LINE_EVERY_S or self._done == self._total:
            self.say(f"{self._done} of {self._total}, {text}{self._left()}")

    def _left(self) -> str:
        fresh = self._done - self._already
        seconds = (time.monotonic() - self._started) / fresh * (self._total - self._done)
        if self._done == self._total:
            return ""
        return f", {seconds:.0f} s left" if seconds < 120 else f", {seconds / 60:.0f} min left"

    def result(self, text: str) -> None:
        """One line on stdout; above the bar, where both go to one terminal."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text)

    def say(self, text: str) -> None:
        """One line about what else happens."""
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(f"{self._title}: {text}", highlight=False)
        else:
            click.echo(f"{self._title}: {text}", err=True)
