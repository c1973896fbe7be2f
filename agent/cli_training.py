"""The command that makes the embedded bundle anew."""

from pathlib import Path

import click


@click.command("train-demo")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for pictures and checkpoints")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder of the bundle to write")
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True, help="that draw pictures")
@click.option("--small", is_flag=True, help="a few pictures and steps: shows that it works, makes no good bundle")
def train_demo(work: Path, out: Path, processes: int, small: bool) -> None:
    """Train the embedded bundle from drawn parts; an interrupted run goes on where it stopped."""
    from flawline.models.heap import keep_blocks
    from flawline.models.training.build import DemoPlan, build_demo, small_plan

    keep_blocks()
    build_demo(small_plan() if small else DemoPlan(), work, out, click.echo, processes)
