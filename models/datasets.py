"""Data sets on disk: MVTec AD and VisA as published, and any folder laid out like MVTec AD. No torch here.

    mvtec, folder   SET/test/good/*, SET/test/TYPE/*, SET/ground_truth/TYPE/NAME_mask.png, SET/train/good/*
    visa            split_csv/1cls.csv with the columns object, split, label, image, mask

Nothing is dropped in silence: a picture without its mask, a mask without its picture and a mask of another
size are `Problem`s with their paths.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from flawline.camera.folder import SUFFIXES, list_pictures
from flawline.config.errors import ConfigError

Kind = Literal["mvtec", "visa", "folder"]
KINDS: tuple[Kind, ...] = ("mvtec", "visa", "folder")
GOOD = "good"
SHOWN = 10


@dataclass(frozen=True)
class Sample:
    """One picture. `mask` is None for a good one, and for a defective one whose mask is not known."""

    image: Path
    mask: Path | None
    defect: str  # its type; `good` for a good one

    @property
    def defective(self) -> bool:
        return self.defect != GOOD

    @property
    def has_pixels(self) -> bool:
        """Whether it is known of every pixel what it is."""
        return self.mask is not None or not self.defective


@dataclass(frozen=True)
class Problem:
    """Something about the files that does not fit."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Category:
    """One class of a data set: its test pictures, its good ones to learn from, and what is wrong with it."""

    name: str
    test: tuple[Sample, ...]
    train_good: tuple[Path, ...] = ()
    problems: tuple[Problem, ...] = field(default=())
    with_masks: bool = True  # False: no defective picture has one, so there are image metrics only

    @property
    def defective(self) -> int:
        """How many test pictures are defective."""
        return sum(sample.defective for sample in self.test)


def object_words(kind: Kind, name: str) -> str:
    """What a class is called in the prompts: the published sets' names as they are, as the literature does it;
    of other folders, the name with blanks."""
    return name.replace("_", " ") if kind == "folder" else name


def read_dataset(kind: Kind, root: Path, names: Sequence[str] = (), *, tolerate: bool = False) -> list[Category]:
    """The categories of a data set, sorted by name, or those called `names`, in that order.

    Raises ConfigError that lists the paths where masks are missing or do not fit, unless `tolerate`: then such
    pictures count in the image metrics only and the problems stay in `Category.problems`.
    """
    if not root.is_dir():
        raise ConfigError(f"--root {root}: is not a folder")
    categories = read_visa(root) if kind == "visa" else read_folders(root)
    if not categories:
        layout = "split_csv/1cls.csv" if kind == "visa" else "SET/test/TYPE/ with pictures"
        raise ConfigError(f"--root {root}: holds no data set laid out as {layout}")
    known = {category.name: category for category in categories}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--category {unknown[0]}: not in {root} (there are: {', '.join(sorted(known))})")
    chosen = [known[name] for name in dict.fromkeys(names)] if names else [known[name] for name in sorted(known)]
    problems = [problem for category in chosen for problem in category.problems]
    if problems and not tolerate:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "; ".join(str(problem) for problem in problems[:SHOWN])
        raise ConfigError(
            f"--root {root}: {len(problems)} pictures and masks do not fit together: {listed}{more}. "
            "Mend them, or give --tolerate to use such pictures for the image metrics only"
        )
    return chosen


def read_folders(root: Path) -> list[Category]:
    """`root` as one set in MVTec AD's layout, or a folder of such sets."""
    if _is_set(root):
        return [_mvtec_category(root)]
    return [_mvtec_category(folder) for folder in sorted(root.iterdir()) if folder.is_dir() and _is_set(folder)]


def _is_set(folder: Path) -> bool:
    return any(child.is_dir() and list_pictures(child) for child in _subfolders(folder / "test"))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def _mvtec_category(folder: Path) -> Category:
    samples: list[Sample] = []
    problems: list[Problem] = []
    truth = folder / "ground_truth"
    used: set[Path] = set()
    for type_folder in _subfolders(folder / "test"):
        pictures = list_pictures(type_folder)
        defect = type_folder.name
        masks = _masks_by_stem(truth / defect)
        for stem in {path.stem for path in pictures if defect != GOOD and truth.is_dir()}:
            doubles = [path for path in pictures if path.stem == stem]
            if len(doubles) > 1:
                problems += [Problem(path, f"shares its mask's name with {doubles[0].name}") for path in doubles[1:]]
        for picture in pictures:
            mask = masks.get(picture.stem) if defect != GOOD else None
            if mask is not None:
                used.add(mask)
            elif defect != GOOD and truth.is_dir():
                problems.append(Problem(picture, f"has no mask {truth / defect / (picture.stem + '_mask.png')}"))
            samples.append(Sample(picture, mask, defect))
    if truth.is_dir():
        problems += [Problem(mask, "is a mask without a picture") for mask in list_pictures(truth) if mask not in used]
    train = tuple(list_pictures(folder / "train" / GOOD)) if (folder / "train" / GOOD).is_dir() else ()
    return _checked(folder.resolve().name, samples, train, problems)


def _masks_by_stem(folder: Path) -> dict[str, Path]:
    """Masks by the stem of their picture: NAME_mask.png, or NAME.png as some sets have it."""
    masks: dict[str, Path] = {}
    for path in list_pictures(folder) if folder.is_dir() else []:
        masks.setdefault(path.stem.removesuffix("_mask"), path)
    return masks


def read_visa(root: Path) -> list[Category]:
    """VisA as published, by its own list of the one-class split."""
    table = root / "split_csv" / "1cls.csv"
    columns = {"object", "split", "label", "image", "mask"}
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table}: cannot be read: {error}") from error
    missing = columns - set(reader.fieldnames or ())
    if missing:
        raise ConfigError(f"{table}: lacks the columns {', '.join(sorted(missing))}")
    by_object: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_object.setdefault(row["object"], []).append(row)
    return [_visa_category(root, name, by_object[name]) for name in sorted(by_object)]


def _visa_category(root: Path, name: str, rows: Iterable[dict[str, str]]) -> Category:
    samples: list[Sample] = []
    problems: list[Problem] = []
    train: list[Path] = []
    for row in rows:
        picture = root / row["image"]
        normal = row["label"] == "normal"
        if row["split"] != "test":
            train += [picture] if normal else []
            continue
        mask = root / row["mask"] if row["mask"] and not normal else None
        if not picture.is_file():
            problems.append(Problem(picture, "is listed but not there"))
            continue
        if mask is None and not normal:
            problems.append(Problem(picture, "has no mask in the list"))
        elif mask is not None and not mask.is_file():
            problems.append(Problem(picture, f"has no mask {mask}"))
            mask = None
        samples.append(Sample(picture, mask, GOOD if normal else "anomaly"))
    return _checked(name, samples, tuple(train), problems)


def _checked(name: str, samples: list[Sample], train: tuple[Path, ...], problems: list[Problem]) -> Category:
    """The category, its masks held against their pictures. Sizes come from the files' heads alone."""
    checked: list[Sample] = []
    for sample in samples:
        keep = sample
        if sample.mask is not None:
            try:
                size, mask_size = _size(sample.image), _size(sample.mask)
            except ValueError as error:
                problems.append(Problem(Path(str(error)), "is not a picture that can be read"))
                keep = Sample(sample.image, None, sample.defect)
            else:
                if size != mask_size:
                    text = f"is {mask_size[0]} x {mask_size[1]}, its picture {size[0]} x {size[1]}"
                    problems.append(Problem(sample.mask, text))
                    keep = Sample(sample.image, None, sample.defect)
        checked.append(keep)
    with_masks = any(sample.mask is not None for sample in checked)
    return Category(name, tuple(checked), train, tuple(problems), with_masks)


def _size(path: Path) -> tuple[int, int]:
    """Width and height. Raises ValueError with the path."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(str(path)) from error


def good_pictures(folder: Path) -> list[Path]:
    """The pictures of good parts in `folder`. Raises ConfigError where there are none."""
    if not folder.is_dir():
        raise ConfigError(f"--good {folder}: is not a folder")
    pictures = list_pictures(folder)
    if not pictures:
        raise ConfigError(f"--good {folder}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return pictures
