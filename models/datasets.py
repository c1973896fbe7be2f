"""Data sets on disk: MVTec AD and VisA as published, and any folder laid out like MVTec AD. No torch here.

    mvtec, folder   SET/test/good/*, SET/test/TYPE/*, SET/ground_truth/TYPE/NAME_mask.png, SET/train/good/*
    visa            split_csv/1cls.csv with the columns object, split, label, image, mask

Nothing is dropped in silence: a picture without its mask, a mask without its picture and a mask of another
size are `Problem`s with their paths.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from flawline.camera.folder import SUFFIXES, list_pictures
from flawline.config.errors import ConfigError, ImageError
from flawline.models.ground_truth import read_mask

Kind = Literal["mvtec", "visa", "folder"]
KINDS: tuple[Kind, ...] = ("mvtec", "visa", "folder")
GOOD = "good"
GOOD_FOLDERS = ("good", "ok", "normal")
SHOWN = 10
_ORIENTATION = 0x0112  # in EXIF data


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
    refuses: bool = True  # False: it is said, and nothing is to be mended or tolerated

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
    problems = [problem for category in chosen for problem in category.problems if problem.refuses]
    if problems and not tolerate:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "; ".join(str(problem) for problem in problems[:SHOWN])
        raise ConfigError(
            f"--root {root}: {len(problems)} pictures and masks do not fit together: {listed}{more}. "
            "Mend them, or give --tolerate to use such pictures for the image metrics only"
        )
    empty = [category.name for category in chosen if not category.test]
    if empty:
        raise ConfigError(f"--root {root}: no picture of {', '.join(empty)} is there; name the others by --category")
    return chosen


def read_folders(root: Path) -> list[Category]:
    """`root` as one set in MVTec AD's layout, or a folder of such sets."""
    if _is_set(root):
        return [_mvtec_category(root)]
    folders = _subfolders(root)
    categories = [_mvtec_category(folder) for folder in folders if _is_set(folder)]
    if categories:
        others = tuple(_why_no_set(folder) for folder in folders if not _is_set(folder) and _resembles_a_set(folder))
        categories[0] = replace(categories[0], problems=categories[0].problems + others)
    return categories


def _is_set(folder: Path) -> bool:
    return any(child.is_dir() and list_pictures(child) for child in _subfolders(folder / "test"))


def _resembles_a_set(folder: Path) -> bool:
    parts = {"test", "train", "ground_truth"}
    return any(child.name in parts or _is_set(child) for child in _subfolders(folder))


def _why_no_set(folder: Path) -> Problem:
    nested = next((child for child in _subfolders(folder) if _is_set(child)), None)
    why = f"the set is {nested}" if nested is not None else "test/TYPE/ holds no pictures"
    return Problem(folder, f"is left out: {why}", refuses=False)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def _type_of(folder: Path) -> str:
    """A defect's type by its folder; `ok` and `normal`, as some sets have it, in any case, are good."""
    return GOOD if folder.name.lower() in GOOD_FOLDERS else folder.name


def _mvtec_category(folder: Path) -> Category:
    samples: list[Sample] = []
    problems: list[Problem] = []
    truth = folder / "ground_truth"
    used: set[Path] = set()
    for type_folder in _subfolders(folder / "test"):
        pictures = list_pictures(type_folder)
        defect = _type_of(type_folder)
        masks = _Masks(truth / type_folder.name, type_folder, pictures)
        for picture in pictures:
            mask = masks.of(picture) if defect != GOOD else None  # some sets have black ones for good parts too
            used.update(masks.named_like(picture))
            if mask is None and defect != GOOD and truth.is_dir():
                problems.append(Problem(picture, masks.why_not(picture)))
            samples.append(Sample(picture, mask, defect))
    loose = [path for path in list_pictures(folder / "test") if path.parent.name == "test"]
    problems += [Problem(path, "is left out: it lies in no test/TYPE/", refuses=False) for path in loose]
    if truth.is_dir():
        problems += [Problem(mask, "is a mask without a picture") for mask in list_pictures(truth) if mask not in used]
    good = [child for child in _subfolders(folder / "train") if _type_of(child) == GOOD]
    train = tuple(picture for child in good for picture in list_pictures(child))
    return _checked(Path(os.path.abspath(folder)).name, samples, train, problems)


class _Masks:
    """The masks of one type: NAME_mask.png, or NAME.png as some sets have it, in the same sub-folder as the picture,
    or anywhere where no other picture or mask of the type is called so."""

    def __init__(self, folder: Path, pictures_in: Path, pictures: Sequence[Path]) -> None:
        self._folder, self._pictures_in = folder, pictures_in
        self._masks: dict[str, list[Path]] = {}
        for path in list_pictures(folder) if folder.is_dir() else []:
            self._masks.setdefault(path.stem.removesuffix("_mask"), []).append(path)
        self._pictures: dict[str, list[Path]] = {}
        for path in pictures:
            self._pictures.setdefault(path.stem, []).append(path)

    def of(self, picture: Path) -> Path | None:
        """None where there is none, or where it is not known whose it is."""
        place = picture.parent.relative_to(self._pictures_in)
        masks, pictures = self._masks.get(picture.stem, []), self._pictures[picture.stem]
        beside = [mask for mask in masks if mask.parent.relative_to(self._folder) == place]
        if len(beside) == 1 and sum(other.parent == picture.parent for other in pictures) == 1:
            return beside[0]
        return masks[0] if len(masks) == len(pictures) == 1 else None

    def named_like(self, picture: Path) -> list[Path]:
        """Its own, or those of which it is not known whose they are."""
        return self._masks.get(picture.stem, [])

    def why_not(self, picture: Path) -> str:
        others = [other for other in self._pictures[picture.stem] if other != picture]
        if others and self._masks.get(picture.stem):
            return f"shares its mask's name with {others[0].relative_to(self._pictures_in)}"
        place = picture.parent.relative_to(self._pictures_in)
        return f"has no mask {self._folder / place / (picture.stem + '_mask.png')}"


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
    for number, row in enumerate(rows, 2):
        if None in (row[column] for column in columns):
            raise ConfigError(f"{table}: line {number} has too few columns")
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
            train += [picture] if normal else []  # read for --shots alone
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
    there = tuple(picture for picture in train if picture.is_file())
    if len(there) < len(train):
        problems.append(Problem(root / name, f"{len(train) - len(there)} pictures to learn from are not there", False))
    return _checked(name, samples, there, problems)


def _checked(name: str, samples: list[Sample], train: tuple[Path, ...], problems: list[Problem]) -> Category:
    """The category, its masks held against their pictures. Sizes come from the files' heads, masks are read."""
    checked: list[Sample] = []
    for sample in samples:
        keep = sample
        if sample.mask is not None:
            try:
                (size, turned), (mask_size, _) = _size(sample.image), _size(sample.mask)
                marked = bool(read_mask(sample.mask).any())
            except ImageError as error:
                problems.append(Problem(sample.mask, str(error).removeprefix(f"{sample.mask}: ")))
                keep = Sample(sample.image, None, sample.defect)
            except ValueError as error:
                problems.append(Problem(Path(str(error)), "is not a picture that can be read"))
                keep = Sample(sample.image, None, sample.defect)
            else:
                if size != mask_size:
                    text = f"is {mask_size[0]} x {mask_size[1]}, its picture {size[0]} x {size[1]}"
                    text += " (which is turned by its EXIF data: save it upright)" if turned else ""
                    problems.append(Problem(sample.mask, text))
                    keep = Sample(sample.image, None, sample.defect)
                elif not marked:
                    text = "is empty: the picture counts in the image metrics only"
                    problems.append(Problem(sample.mask, text, refuses=False))
                    keep = Sample(sample.image, None, sample.defect)
                elif turned:
                    text = "is turned by its EXIF data, which is not applied: its mask must lie the same way"
                    problems.append(Problem(sample.image, text, refuses=False))
        checked.append(keep)
    with_masks = any(sample.mask is not None for sample in checked)
    return Category(name, tuple(checked), train, tuple(problems), with_masks)


def _size(path: Path) -> tuple[tuple[int, int], bool]:
    """Width and height as stored, and whether viewers turn it. Raises ValueError with the path."""
    try:
        with Image.open(path) as picture:
            return picture.size, picture.getexif().get(_ORIENTATION, 1) not in (0, 1)
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
