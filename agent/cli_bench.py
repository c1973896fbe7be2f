"""`flawline bench`: stage times of this machine beside a plain reference. Torch is loaded only when it runs."""

import json
from pathlib import Path
from typing import Any

import click

from flawline.agent.cli_inspect import find_pictures
from flawline.agent.progress import WorkProgress
from flawline.config.errors import ConfigError
from flawline.models.results import STAGES

EDGE_INPUT = 512  # of SAM, px, beside the bundle's own


def _size(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, int]:
    parts = value.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and 32 <= int(part) <= 8192 for part in parts):
        raise click.BadParameter("give width x height, as in 1280x960, each from 32 to 8192 px")
    return int(parts[0]), int(parts[1])


@click.command()
@click.option("--bundle", default="demo", show_default=True, help="a bundle's name, or its folder")
@click.option(
    "--random",
    "random_sam",
    type=click.Choice(["vit_h", "vit_l", "vit_b", "vit_t"]),
    help="instead of a bundle: ViT-L-14-336 at 518 px and this SAM with random weights",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--precision", default="auto", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), show_default=True)
@click.option(
    "--image", type=click.Path(path_type=Path, dir_okay=False), help="time this picture [default: a drawn one]"
)
@click.option("--size", default="1280x960", callback=_size, show_default=True, help="of the drawn picture")
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="rounds; the median counts")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch [default: its own choice]")
@click.option("--switch", "switches", multiple=True, metavar="NAME=VALUE", help="as in attention=plain or graphs=on")
@click.option("--variants", is_flag=True, help="instead: a table of SAM's sizes and inputs; see --pictures")
@click.option("--guard", is_flag=True, help="instead: do precisions and switches change verdicts on --pictures")
@click.option(
    "--pictures", type=click.Path(path_type=Path), multiple=True, help="files or folders for --guard and --variants"
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def bench(
    bundle: str,
    random_sam: str | None,
    device: str,
    precision: str,
    image: Path | None,
    size: tuple[int, int],
    runs: int,
    threads: int | None,
    switches: tuple[str, ...],
    variants: bool,
    guard: bool,
    pictures: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Measure stage times against a plain reference pipeline in the same run.

    The reference is open_clip's forward and segment_anything's SamPredictor with three predicts, in float32 on
    the same device, with its points given; on CUDA under bf16 autocast too.
    """
    if guard and not pictures:
        raise ConfigError("--guard compares verdicts: say on which pictures with --pictures")
    import torch

    from flawline.models.bench import bench as measure
    from flawline.models.bench import from_bundle, machine, texture, versions
    from flawline.models.heap import keep_blocks
    from flawline.models.switches import Switches
    from flawline.models.towers import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = Switches.parse(switches, "--switch") if switches else Switches.from_environment()
    keep_blocks(chosen)
    source = from_bundle(bundle, device) if random_sam is None else _random(random_sam, 1024, device)
    picture = texture(size[1], size[0]) if image is None else _read(image)
    given = [_read(path) for path, _ in find_pictures(pictures)]
    with WorkProgress("bench") as progress:
        if guard or variants:
            from flawline.models import bench_variants

            rows: list[dict[str, Any]]
            if guard:
                precisions = ["fp32", "bf16", "fp16"] if precision == "auto" else [precision]
                progress.start(3 + len(precisions))
                rows = bench_variants.guard(source, given, precisions, lambda: progress.step("a way"))
            else:
                sources = _variants(random_sam is not None, device)
                progress.start(len(sources))
                compare = random_sam is None and bool(given)
                rows = bench_variants.variants(
                    sources, precision, given or [picture], runs, compare=compare, on_row=lambda: progress.step("one")
                )
            about = {"machine": machine(choose_device(device)), "versions": versions()}
            result = about | {"guard" if guard else "variants": rows}
        else:
            progress.start(runs)
            result = measure(source, precision, picture, runs, chosen, lambda: progress.step("a round"))
    if as_json:
        click.echo(json.dumps(result))
    elif guard or variants:
        _print_rows(rows)
    else:
        _print(result)


def _random(sam: str, sam_input: int, device: str) -> Any:
    from flawline.models.random_towers import random_bundle, random_towers

    described = random_bundle(sam, sam_input)
    return lambda precision, switches: random_towers(described, device, precision, switches)


def _variants(random: bool, device: str) -> dict[str, Any]:
    """By name: every SAM that there is, at its own input and at the smaller one."""
    from flawline.models.bench import from_bundle
    from flawline.models.bundle import installed, open_bundle
    from flawline.models.known_bundles import KNOWN
    from flawline.models.random_towers import NAMES

    if random:
        return {f"{name} {edge}": _random(name, edge, device) for name in NAMES for edge in (1024, EDGE_INPUT)}
    here = {folder.name: folder for folder in installed()}
    sources = {}
    for name in KNOWN:
        if name not in here:
            continue
        own = open_bundle(here[name])
        sources[f"{name} {own.manifest.sam.input_size}"] = from_bundle(own, device)
        sources[f"{name} {EDGE_INPUT}"] = from_bundle(own.with_sam_input(EDGE_INPUT), device)
    if not sources:
        raise ConfigError(f"--variants: none of {', '.join(KNOWN)} is installed; fetch one, or add --random vit_h")
    return sources


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
    click.echo(f"{'':12}{'flawline':>10}{'reference':>11}{'99th':>9}")
    for stage in STAGES:
        reference = f"{theirs[stage]:11.1f}" if stage in theirs else f"{'-':>11}"
        click.echo(f"{stage:12}{ours[stage]:10.1f}{reference}")
    late = result["p99_ms"]
    click.echo(
        f"{'suspicious':12}{ours['suspicious']:10.1f}{result['reference_ms']:11.1f}{late['suspicious']:9.1f}"
        f"   ratio {result['ratio']:.2f}"
    )
    click.echo(f"{'clean':12}{ours['clean']:10.1f}{'-':>11}{late['clean']:9.1f}")
    if "ratio_bf16" in result:
        click.echo(f"reference under bf16 autocast {result['reference_bf16_ms']:.1f}, ratio {result['ratio_bf16']:.2f}")
    rates = result["frames_per_second"]
    click.echo(
        f"\nframes/s: clean {rates['clean']:.1f}, suspicious {rates['suspicious']:.1f}, a day of 1 % suspicious "
        f"{rates['day']:.1f}; 8 cameras at once {rates['batch_clean']:.1f} and {rates['batch_suspicious']:.1f}"
    )


def _print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = []
        for name, value in row.items():
            inner = value.items() if isinstance(value, dict) else [(name, value)]
            cells += [f"{key} {shown}" for key, shown in inner]
        click.echo(", ".join(cells))
