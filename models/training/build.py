"""Builds the embedded bundle from nothing but the generator and two packages of published weights: one command.

Pictures, CLIP's image side, its text side, SAM, thresholds, bundle folder. Every step leaves a file in the work
folder and is skipped where that file is there, so that an interrupted run goes on where it stopped.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flawline.config.recipe import Recipe
from flawline.models.bundle import Bundle, PromptWords
from flawline.models.checkpoints import load_weights, read_state_dict
from flawline.models.clip import DenseClip
from flawline.models.inspector import Inspector
from flawline.models.localise import AdapterLocaliser
from flawline.models.pyramid import WIDTH
from flawline.models.sam import TRUNK, build_sam, own_state
from flawline.models.text import mean_direction
from flawline.models.thresholds import best_decision
from flawline.models.towers import load_adapter
from flawline.models.training.align import align_positions
from flawline.models.training.bundle_folder import SAM_SETTINGS, write_bundle
from flawline.models.training.pictures import Pictures, PictureSet, draw_set
from flawline.models.training.product_prompts import ProductPrompts
from flawline.models.training.token_table import VOCABULARY, make_token_table
from flawline.models.training.train_clip import (
    EMBED_DIM,
    TEMPERATURE,
    TEXT_WIDTH,
    Anchors,
    ClipSchedule,
    new_clip,
    train_clip,
)
from flawline.models.training.train_pyramid import PyramidSchedule, directions, train_pyramid
from flawline.models.training.train_sam import SamSchedule, train_sam
from flawline.models.training.train_text import TextSchedule, train_projection, train_text
from flawline.models.training.validate import clip_maps, figures, prompt_quality
from flawline.models.words import Words

Say = Callable[[str], None]
CLIP_PICTURES = PictureSet("train", 8000, 384, 1, 0.3, faint=True)
UNSEEN_PICTURES = PictureSet("unseen", 300, 384, 2, 0.5, unseen=True)
GO_ON_PICTURES = 7000  # of CLIP's, where an earlier one is trained on
FURTHER_FINISH = 0.18  # of the further steps of CLIP's image side with mostly focal and dice
FURTHER_RATE = 2.5e-4  # of its pyramid and linear layers
FURTHER_TRUNK_RATE = 1e-4  # of its backbone
FURTHER_STRIKING = 0.25  # weight of the loss of each picture's most striking places
FURTHER_KEPT = 0.3  # share of the weights before them in the average
SEEDS = 1000  # apart, so that no run's pictures are another's held-out ones
SAM_PICTURES = PictureSet("sam", 6000, 512, 3, 0.1)
SAM_UNSEEN_PICTURES = PictureSet("sam-unseen", 200, 512, 4, 0.1, unseen=True)


@dataclass(frozen=True)
class DemoPlan:
    """Everything that the embedded bundle depends on, besides the code."""

    input_size: int = 384
    clip_pictures: PictureSet = CLIP_PICTURES
    unseen_pictures: PictureSet = UNSEEN_PICTURES
    sam_pictures: PictureSet = SAM_PICTURES
    sam_unseen: PictureSet = SAM_UNSEEN_PICTURES
    sentence_model: bool = True  # False: a random token table, for trying the way
    clip: ClipSchedule = field(default_factory=ClipSchedule)
    pyramid: PyramidSchedule = field(default_factory=PyramidSchedule)
    further: ClipSchedule | None = None  # of an earlier bundle's image side
    text: TextSchedule = field(default_factory=TextSchedule)
    sam: SamSchedule = field(default_factory=SamSchedule)


def go_on_plan(plan: DemoPlan, start: Bundle, clip_steps: int | None = None) -> DemoPlan:
    """For a CLIP that knows its way, at a lower rate, and a SAM that can read prompts already.

    The latter without shapes and balanced term, and with fewer whole frames.
    """
    further = None
    if clip_steps is not None:
        finish = max(1, round(clip_steps * FURTHER_FINISH))
        further = replace(
            plan.clip,
            steps=clip_steps - finish,
            finish=finish,
            rate=FURTHER_RATE,
            backbone_rate=FURTHER_TRUNK_RATE,
            striking=FURTHER_STRIKING,
        )
    sam = replace(plan.sam, shapes=0, frames=plan.sam.frames // 2, balance=0.0)
    size = start.manifest.clip.input_size
    return replace(
        plan,
        input_size=size,
        clip_pictures=replace(plan.clip_pictures, count=min(plan.clip_pictures.count, GO_ON_PICTURES)),
        unseen_pictures=replace(plan.unseen_pictures, size=size),
        further=further,
        sam=sam,
    )


def with_photographs(plan: DemoPlan, folder: Path) -> DemoPlan:
    """Half of the parts that CLIP and SAM are trained on are made of photographs; what they are judged by is drawn."""
    album = str(folder.resolve())
    return replace(
        plan,
        clip_pictures=replace(plan.clip_pictures, photographs=album),
        sam_pictures=replace(plan.sam_pictures, photographs=album),
    )


def with_seed(plan: DemoPlan, seed: int) -> DemoPlan:
    """Other pictures in another order, for a run that goes on from one that has seen those of seed 0.

    What the bundle is judged by stays the same.
    """
    return replace(
        plan,
        clip_pictures=replace(plan.clip_pictures, seed=plan.clip_pictures.seed + SEEDS * seed),
        sam_pictures=replace(plan.sam_pictures, seed=plan.sam_pictures.seed + SEEDS * seed),
        pyramid=replace(plan.pyramid, seed=plan.pyramid.seed + SEEDS * seed),
        further=plan.further and replace(plan.further, seed=plan.further.seed + SEEDS * seed),
        sam=replace(plan.sam, seed=plan.sam.seed + SEEDS * seed),
    )


def small_plan() -> DemoPlan:
    """Every step of the way in a minute or two, for tests."""
    return DemoPlan(
        input_size=128,
        clip_pictures=replace(CLIP_PICTURES, count=24, size=128),
        unseen_pictures=replace(UNSEEN_PICTURES, count=12, size=128),
        sam_pictures=replace(SAM_PICTURES, count=16, size=512),
        sam_unseen=replace(SAM_UNSEEN_PICTURES, count=4, size=512),
        sentence_model=False,
        clip=ClipSchedule(steps=3, finish=2, batch=2, sizes=(128,), checkpoint_every=2),
        text=TextSchedule(steps=4, batch=8, head_steps=4),
        sam=SamSchedule(shapes=1, windows=2, frames=1, window_batch=2, frame_batch=2, checkpoint_every=2),
    )


def build_demo(
    plan: DemoPlan, work: Path, bundle: Path, say: Say, processes: int = 2, start: Bundle | None = None
) -> None:
    """Train and write the bundle folder; `work` keeps pictures and checkpoints.

    With `start`, CLIP is that bundle's but for what `plan.pyramid` and `plan.further` train on, and SAM goes on from
    its weights.
    """
    work.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        say(f"{time.strftime('%H:%M:%S')} {line}")
        with (work / "log.txt").open("a") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    clip, adapter = clip_side(plan, work, log, processes) if start is None else clip_of(start, work)
    text = plain_words(clip)
    if plan.pyramid.steps:
        pyramid_side(plan, clip, adapter, text, work, log, processes)
    if plan.further is not None:
        image_side(plan, plan.further, clip, adapter, text, work, log, processes)
    thresholds = {"region": region_threshold(plan, clip, text, adapter, work, log, processes)}
    sam = sam_side(plan, clip, adapter, text, thresholds["region"], work, log, processes, start)
    write = partial(
        write_bundle,
        bundle,
        work / "clip.json",
        clip,
        adapter,
        sam,
        input_size=plan.input_size,
        photographs=bool(plan.clip_pictures.photographs),
    )
    write(thresholds=thresholds)
    thresholds["decision"] = decision_threshold(plan, bundle, work, log, processes)
    write(thresholds=thresholds)
    record = {"plan": asdict(plan), "torch": version("torch"), "timm": version("timm")}
    (work / "plan.json").write_text(json.dumps(record, indent=2))
    log(f"bundle written to {bundle}")


def clip_side(plan: DemoPlan, work: Path, say: Say, processes: int) -> tuple[DenseClip, AdapterLocaliser]:
    """CLIP: image side first, against learnt directions, then the text tower towards them."""
    table_file = work / "token-table.safetensors"
    if not table_file.exists():
        say("token table: embedding CLIP's vocabulary")
        table = make_token_table(TEXT_WIDTH) if plan.sentence_model else torch.randn(VOCABULARY, TEXT_WIDTH)
        save_file({"table": table.contiguous()}, table_file)
    clip = new_clip(work, load_file(table_file)["table"], plan.input_size)
    adapter, anchors = AdapterLocaliser([WIDTH] * 3, EMBED_DIM, TEMPERATURE, centred=False), Anchors()
    finished = work / "clip-side.safetensors"
    modules = torch.nn.ModuleDict({"clip": clip.model, "adapter": adapter, "anchors": anchors})
    if not finished.exists():
        pictures = draw_set(plan.clip_pictures, work, processes)
        unseen = draw_set(plan.unseen_pictures, work, processes)

        def validate(clip: DenseClip, adapter: AdapterLocaliser, anchors: Anchors) -> dict[str, float]:
            some = slice(None, None, 3)
            texts = [anchors.pair().detach()] * len(unseen.words[some])
            maps = clip_maps(clip, adapter, unseen.image[some], texts, plan.input_size)
            return figures(maps[:, ::3, ::3], unseen.kinds[some][:, ::3, ::3] > 0)

        adapter, anchors = train_clip(clip, pictures, plan.clip, work, say, validate)
        train_text(clip, anchors, pictures, plan.text, say)
        train_projection(clip, pictures, plan.text, say)
        modules = torch.nn.ModuleDict({"clip": clip.model, "adapter": adapter, "anchors": anchors})
        save_file({name: value.contiguous() for name, value in modules.state_dict().items()}, finished)
    modules.load_state_dict(load_file(finished))
    modules.requires_grad_(False)
    clip.model.visual.to(memory_format=torch.channels_last)
    return clip, adapter.eval()


def clip_of(start: Bundle, work: Path) -> tuple[DenseClip, AdapterLocaliser]:
    """CLIP of an earlier embedded bundle; blocks that its pyramid did not have yet change nothing at first."""
    (work / "clip.json").write_bytes(start.path("clip.json").read_bytes())
    clip = DenseClip(start.manifest.clip, start.folder)
    go_on_from(clip.model, start.path(start.manifest.clip.checkpoint), "visual.trunk.deepen.")
    clip.model.visual.to(memory_format=torch.channels_last)
    return clip, load_adapter(start, clip)


def pyramid_side(
    plan: DemoPlan,
    clip: DenseClip,
    adapter: AdapterLocaliser,
    text: Tensor,
    work: Path,
    say: Say,
    processes: int,
) -> None:
    """CLIP's pyramid and linear layers trained on, in place."""
    modules = torch.nn.ModuleDict({"pyramid": clip.model.visual.trunk, "adapter": adapter})
    finished = work / "pyramid-side.safetensors"
    if not finished.exists():
        pictures = draw_set(plan.clip_pictures, work, processes)
        unseen = draw_set(plan.unseen_pictures, work, processes)

        train_pyramid(
            clip, adapter, pictures, plan.pyramid, work, say, lambda: map_figures(plan, clip, adapter, text, unseen)
        )
        save_file({name: value.contiguous() for name, value in modules.state_dict().items()}, finished)
    modules.load_state_dict(load_file(finished))


def image_side(
    plan: DemoPlan,
    schedule: ClipSchedule,
    clip: DenseClip,
    adapter: AdapterLocaliser,
    text: Tensor,
    work: Path,
    say: Say,
    processes: int,
) -> None:
    """CLIP's trunk, pyramid and linear layers trained on, in place, towards what its text tower says.

    A share of the weights that it began with is kept: that is better than either on families never seen.
    """
    modules = torch.nn.ModuleDict({"clip": clip.model, "adapter": adapter})
    finished = work / "image-side.safetensors"
    if not finished.exists():
        pictures = draw_set(plan.clip_pictures, work, processes)
        unseen = draw_set(plan.unseen_pictures, work, processes)

        former = {name: value.clone() for name, value in modules.state_dict().items()}

        def validate(clip: DenseClip, adapter: AdapterLocaliser, _: Anchors) -> dict[str, float]:
            return map_figures(plan, clip, adapter, text, unseen)

        anchors = Anchors()
        with torch.no_grad():
            anchors.weight.copy_(directions(clip, ["object"])[0])
        train_clip(clip, pictures, schedule, work, say, validate, (adapter, anchors))
        with torch.no_grad():
            for name, value in modules.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(former[name], FURTHER_KEPT)
        train_projection(clip, pictures, plan.text, say)
        save_file({name: value.contiguous() for name, value in modules.state_dict().items()}, finished)
    modules.load_state_dict(load_file(finished))
    modules.requires_grad_(False)
    adapter.eval()


def map_figures(
    plan: DemoPlan, clip: DenseClip, adapter: AdapterLocaliser, text: Tensor, unseen: Pictures
) -> dict[str, float]:
    """How good CLIP's map is on pictures of families kept from training."""
    maps = clip_maps(clip, adapter, unseen.image, [text] * len(unseen), plan.input_size)
    return figures(maps[:, ::2, ::2], unseen.kinds[:, ::2, ::2] > 0)


def plain_words(clip: DenseClip) -> Tensor:
    """(D, 2) text features of the sentences that the product asks by where a recipe has no words of its own."""
    words = Words.of(Recipe(), PromptWords())
    return torch.stack([mean_direction(clip, words.normal), mean_direction(clip, words.abnormal)], dim=1)


def region_threshold(
    plan: DemoPlan,
    clip: DenseClip,
    text: Tensor,
    adapter: AdapterLocaliser,
    work: Path,
    say: Say,
    processes: int,
) -> float:
    """Where S_a is cut: the threshold of the largest pixel F1 on drawn parts of families kept from training."""
    unseen = draw_set(plan.unseen_pictures, work, processes)
    measured = map_figures(plan, clip, adapter, text, unseen)
    say("clip, unseen families: " + " ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    return round(measured["at"], 3)


def decision_threshold(plan: DemoPlan, bundle: Path, work: Path, say: Say, processes: int) -> float:
    """Where good and defective drawn parts of unseen families are told apart best, as the product judges them.

    The threshold of the largest balanced accuracy (mean share of good parts passed and of bad parts failed) of the
    image score. A line of its own wants `flawline calibrate`: what a false reject costs is not known here.
    """
    unseen = draw_set(plan.unseen_pictures, work, processes)
    inspector = Inspector.load(bundle, device="cpu")
    maps, scores = [], []
    for image in unseen.image:
        result = inspector.inspect(np.asarray(image))
        maps.append(result.anomaly_map[::2, ::2])
        scores.append(result.score)
    bad = np.asarray((unseen.kinds > 0).reshape(len(unseen), -1).any(axis=1))
    region = inspector.towers.bundle.manifest.thresholds.region
    best, accuracy = best_decision(np.array(scores), bad, region)
    measured = figures(np.stack(maps), unseen.kinds[:, ::2, ::2] > 0)
    say("product, unseen families: " + " ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    say(f"decision threshold {best:.3f}: balanced accuracy {accuracy:.3f}")
    return best


def sam_side(
    plan: DemoPlan,
    clip: DenseClip,
    adapter: AdapterLocaliser,
    text: Tensor,
    threshold: float,
    work: Path,
    say: Say,
    processes: int,
    start: Bundle | None = None,
) -> Any:
    """SAM on CLIP's trunk; part of its prompts are made by CLIP's map and PPG, as in the product."""
    torch.manual_seed(plan.sam.seed)
    sam = build_sam(SAM_SETTINGS, clip.model.visual.trunk)
    if start is None:
        align_positions(sam)
    else:
        blocks = ("image_encoder.neck.coarse.", "image_encoder.neck.fine.", "image_encoder.neck.finest.")
        go_on_from(sam, start.path("sam.safetensors"), TRUNK, *blocks)
    if not plan.sam.steps:  # the trunk may have changed a little under it: measure (tests/bench/held_out.py)
        return sam.requires_grad_(False)
    finished = work / "sam-side.safetensors"
    if not finished.exists():
        pictures = draw_set(plan.sam_pictures, work, processes)
        unseen = draw_set(plan.sam_unseen, work, processes)
        prompts = ProductPrompts(clip, adapter, text, sam, pictures, threshold)
        train_sam(sam, pictures, plan.sam, work, say, lambda: prompt_quality(sam, unseen), prompts)
        save_file(own_state(sam, SAM_SETTINGS), finished)
    sam.load_state_dict(load_file(finished), strict=False)
    return sam.requires_grad_(False)


def go_on_from(module: torch.nn.Module, checkpoint: Path, *own: str) -> None:
    """Load the weights of an earlier bundle; tensors whose names begin with one of `own` may be missing there."""
    state, mine = read_state_dict(checkpoint), module.state_dict()
    added = {name: mine[name] for name in mine.keys() - state.keys() if name.startswith(own)}
    load_weights(module, added | state, checkpoint)
