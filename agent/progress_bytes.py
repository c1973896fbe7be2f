"""Progress of downloads on stderr: a bar per file on a terminal, a plain line now and then elsewhere."""

import time

import click
import rich.progress

from flawline.agent.progress import LINE_EVERY_S, Progress


class ByteProgress(Progress):
    """Told of every file how many bytes are here. Use it in a `with` block."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        super().__init__(rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn())
        self._every_s = every_s
        self._said: dict[str, float] = {}
        self._finished: set[str] = set()
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def update(self, name: str, here: int, total: int) -> None:
        """`here` of `total` bytes of the file `name`."""
        if self._bar is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=total)
            self._bar.update(self._tasks[name], completed=here)
            return
        now = time.monotonic()
        done = here == total and name not in self._finished
        if done or name not in self._said or (here < total and now - self._said[name] >= self._every_s):
            self._said[name] = now
            click.echo(f"{name}: {megabytes(here)} of {megabytes(total)}", err=True)
        if done:
            self._finished.add(name)


def megabytes(count: int) -> str:
    """A size for people, in decimal units as disks and downloads have them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
