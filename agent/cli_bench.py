"""`flawline bench`: stage times of this machine beside a plain reference. Torch is loaded only when it runs."""

import json
from pathlib import Path
from typing import Any

import click

from flawline.agent.progress import WorkProgress

STAGES = ("clip", "encode", "prompt", "cascade")


def _size(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, int]:
    parts = value.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and 32 <= int(part) <= 8192 for part in parts):
        raise click.BadParameter("give width x height, as in 1280x960, each from 32 to 8192 px")
    return int(parts[0]), int(parts[1])


@click.command()
@click.option("--bundle", default="demo", show_default=True, help="a bundle's name, or its folder")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--precision", default="auto", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), show_default=True)
@click.option(
    "--image", type=click.Path(path_type=Path, dir_okay=False), help="time this picture [default: a drawn one]"
)
@click.option("--size", default="1280x960", callback=_size, show_default=True, help="of the drawn picture")
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="rounds; the median counts")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch [default: its own choice]")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def bench(
    bundle: str,
    device: str,
    precision: str,
    image: Path | None,
    size: tuple[int, int],
    runs: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure stage times against a plain reference pipeline in the same run.

    The reference is open_clip's forward and segment_anything's SamPredictor with three predicts, in float32 on
    the same device, with its points given.
    """
    import torch

    from flawline.models.bench import bench as measure
    from flawline.models.bench import texture

    if threads is not None:
        torch.set_num_threads(threads)
    picture = texture(size[1], size[0]) if image is None else _read(image)
    with WorkProgress("bench") as progress:
        progress.start(runs)
        result = measure(bundle, device, precision, picture, runs, lambda: progress.step("a round"))
    if as_json:
        click.echo(json.dumps(result))
        return
    _print(result)


def _read(path: Path) -> Any:
    import numpy as np

    from flawline.camera.folder import read_picture
    from flawline.camera.pixels import to_rgb8

    pixels, pixel_format = read_picture(path)
    picture = np.empty((*pixels.shape[:2], 3), np.uint8)
    to_rgb8(pixels, pixel_format, picture)
    return picture


def _print(result: dict[str, Any]) -> None:
    machine, ours, theirs = result["machine"], result["flawline_ms"], result["reference_stage_ms"]
    height, width = result["picture"]
    click.echo(f"{machine['device']} ({machine['cpu']}, {machine['threads']} threads), bundle {result['bundle']}")
    click.echo(f"{width} x {height} px, {result['precision']}, median of {result['runs']} runs, ms\n")
    click.echo(f"{'':12}{'flawline':>10}{'reference':>11}")
    for stage in STAGES:
        reference = f"{theirs[stage]:11.1f}" if stage in theirs else f"{'-':>11}"
        click.echo(f"{stage:12}{ours[stage]:10.1f}{reference}")
    click.echo(
        f"{'suspicious':12}{ours['suspicious']:10.1f}{result['reference_ms']:11.1f}   ratio {result['ratio']:.2f}"
    )
    click.echo(f"{'clean':12}{ours['clean']:10.1f}{'-':>11}")
