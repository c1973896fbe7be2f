"""The command that makes the embedded bundle anew."""

from dataclasses import replace
from pathlib import Path

import click


@click.command("train-demo")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for pictures and checkpoints")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder of the bundle to write")
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True, help="that draw pictures")
@click.option("--small", is_flag=True, help="a few pictures and steps: shows that it works, makes no good bundle")
@click.option(
    "--from", "start", metavar="BUNDLE", help="train this bundle's SAM on; its CLIP only by --pyramid, --clip"
)
@click.option(
    "--pyramid", type=click.IntRange(min=0), default=0, show_default=True, help="further steps of CLIP's pyramid"
)
@click.option("--clip", type=click.IntRange(min=2), help="further steps of all of CLIP that looks at pictures")
@click.option(
    "--windows", type=click.IntRange(min=0), help="steps of SAM's main phase; 0 with --from: SAM stays as it is"
)
@click.option(
    "--photographs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="folder of pictures that half of the parts are made of, some kept from training",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of pictures and their order")
@click.option("--bfloat16", is_flag=True, help="a third quicker where the processor has avx512_bf16 or amx")
def train_demo(
    work: Path,
    out: Path,
    processes: int,
    small: bool,
    start: str | None,
    pyramid: int,
    clip: int | None,
    windows: int | None,
    photographs: Path | None,
    seed: int,
    bfloat16: bool,
) -> None:
    """Train the embedded bundle from drawn parts; an interrupted run goes on where it stopped."""
    from flawline.models.bundle import open_bundle
    from flawline.models.heap import keep_blocks
    from flawline.models.training.build import DemoPlan, build_demo, go_on_plan, small_plan, with_photographs, with_seed

    keep_blocks()
    plan = small_plan() if small else DemoPlan()
    sam = replace(plan.sam, windows=plan.sam.windows if windows is None else windows, bfloat16=bfloat16)
    plan = replace(plan, sam=sam, pyramid=replace(plan.pyramid, steps=pyramid, bfloat16=bfloat16))
    earlier = None if start is None else open_bundle(start)
    if earlier is not None:
        plan = go_on_plan(plan, earlier, clip)
    elif clip is not None:
        raise click.UsageError("--clip needs --from: what is trained from nothing has its own number of steps")
    if windows == 0:
        if earlier is None:
            raise click.UsageError("--windows 0 needs --from: there is no SAM to keep")
        plan = replace(plan, sam=replace(plan.sam, frames=0))
    if photographs is not None:
        plan = with_photographs(plan, photographs)
    plan = with_seed(plan, seed)
    build_demo(plan, work, out, click.echo, processes, earlier)
