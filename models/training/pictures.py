"""Drawn pictures on disk: made once, in parallel, in chunks that an interrupted run goes on from."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from flawline.camera.synthetic import (
    DEFECT_KINDS,
    TRAIN_FAMILIES,
    UNSEEN_DEFECT_KINDS,
    UNSEEN_FAMILIES,
    choose_product,
    draw_part,
)
from flawline.models.training.photographs import open_album

CHUNK = 100
PLANES = {"image": 3, "kinds": 0, "parts": 0}  # channels; 0 for a plane without


@dataclass(frozen=True)
class PictureSet:
    """What is to be drawn: `unseen` takes the families kept from training, and kinds of defects kept from it too."""

    name: str
    count: int
    size: int  # edge, px
    seed: int
    good_share: (
        float  # drawn without a defect; of the others a few stay good, where every defect drawn would be invisible
    )
    unseen: bool = False
    faint: bool = False  # defects that a person would hardly see too
    photographs: str = ""  # folder of photographs that some of the parts are made of
    photographed: float = 0.5  # share of these parts


@dataclass
class Pictures:
    """A drawn set, mapped into memory."""

    image: NDArray[np.uint8]  # (N, S, S, 3) RGB
    kinds: NDArray[np.uint8]  # (N, S, S) 0, or 1 + the place in DEFECT_KINDS
    parts: NDArray[np.uint8]  # (N, S, S) instances of normal structures, 0 where there is none
    words: list[dict[str, Any]]  # object, material, defects, captions

    def __len__(self) -> int:
        return len(self.words)


def draw_set(wanted: PictureSet, folder: Path, processes: int = 2) -> Pictures:
    """Draw what is missing of a set and open it. The same seed draws the same pictures, however interrupted."""
    kind = "-faint" * wanted.faint + f"-photographs-{wanted.photographed}" * bool(wanted.photographs)
    target = folder / f"{wanted.name}-{wanted.count}-{wanted.size}-{wanted.seed}{kind}"
    target.mkdir(parents=True, exist_ok=True)
    chunks = range(-(-wanted.count // CHUNK))
    missing = [number for number in chunks if not (target / f"words-{number:04}.json").exists()]
    if missing:
        # Not forked: a parent whose threads compute may leave a lock behind that nobody opens.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(draw_chunk, [wanted] * len(missing), [target] * len(missing), missing))
    planes = {name: _joined(target, name, wanted.count) for name in PLANES}
    words = [entry for number in chunks for entry in json.loads((target / f"words-{number:04}.json").read_text())]
    return Pictures(**planes, words=words)


def _joined(target: Path, name: str, count: int) -> NDArray[np.uint8]:
    """One plane of all pictures, mapped from one file, which takes the place of the chunks' files."""
    whole = target / f"{name}.npy"
    if not whole.exists():
        parts = sorted(target.glob(f"{name}-*.npy"))
        shape = np.load(parts[0], mmap_mode="r").shape[1:]
        partial = whole.with_suffix(".partial")
        joined = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, *shape))
        for number, part in enumerate(parts):
            chunk = np.load(part)
            joined[number * CHUNK : number * CHUNK + len(chunk)] = chunk
        joined.flush()
        partial.replace(whole)
        for part in parts:
            part.unlink()
    mapped: NDArray[np.uint8] = np.load(whole, mmap_mode="c")  # torch warns of what it could not write to
    return mapped


def draw_chunk(wanted: PictureSet, target: Path, number: int) -> None:
    """Draw pictures `number` * CHUNK and on into files of their own; the words, written last, say that it is whole."""
    cv2.setNumThreads(1)
    count = min(CHUNK, wanted.count - number * CHUNK)
    size = wanted.size
    planes = {
        name: np.zeros((count, size, size, *([channels] if channels else [])), np.uint8)
        for name, channels in PLANES.items()
    }
    words = []
    album = open_album(Path(wanted.photographs), wanted.unseen) if wanted.photographs else None
    for place in range(count):
        rng = np.random.default_rng((wanted.seed, number, place))
        families = UNSEEN_FAMILIES if wanted.unseen else TRAIN_FAMILIES
        product = choose_product(rng, families=families)
        if album is not None and rng.random() < wanted.photographed:
            product = album.dress(rng, product)
        defects = 0 if rng.random() < wanted.good_share else int(rng.choice([1, 1, 1, 2, 2, 3, 4]))
        kinds = tuple(kind for kind in DEFECT_KINDS if wanted.unseen or kind not in UNSEEN_DEFECT_KINDS)
        sample = draw_part(rng, product, size, size, defects=defects, kinds=kinds, faint=wanted.faint)
        planes["image"][place], planes["kinds"][place], planes["parts"][place] = (
            sample.image,
            sample.kinds,
            sample.parts,
        )
        words.append(
            {
                "object": sample.object,
                "material": sample.material,
                "defects": [kind for kind, _ in sample.defects],
                "captions": [sample.caption(rng) for _ in range(4)],
            }
        )
    for name, plane in planes.items():
        np.save(target / f"{name}-{number:04}.npy", plane)
    (target / f"words-{number:04}.json").write_text(json.dumps(words))
