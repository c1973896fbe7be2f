"""Published layouts are read whole, and what does not fit is named with its path."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor

from flawline.config.errors import ConfigError, ImageError
from flawline.models.datasets import good_pictures, read_dataset
from flawline.models.ground_truth import read_mask, read_rgb, truth


def picture(path: Path, size: tuple[int, int] = (12, 10), value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 10)).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (12, 10), value: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(size[::-1], np.uint8)
    array[2:6, 3:8] = value
    Image.fromarray(array).save(path)
    return path


def mvtec(root: Path, name: str = "metal_nut") -> Path:
    for number in range(2):
        picture(root / name / "train" / "good" / f"{number:03}.png")
        picture(root / name / "test" / "good" / f"{number:03}.png")
    for defect in ("bent", "scratch"):
        for number in range(3):
            picture(root / name / "test" / defect / f"{number:03}.png")
            mask(root / name / "ground_truth" / defect / f"{number:03}_mask.png")
    return root / name


def visa(root: Path) -> Path:
    lines = ["object,split,label,image,mask"]
    for split, label, number in [("train", "normal", 0), ("test", "normal", 1), ("test", "anomaly", 2)]:
        kind = "Normal" if label == "normal" else "Anomaly"
        image = f"candle/Data/Images/{kind}/{number:04}.JPG"
        picture(root / image)
        mask_name = ""
        if label == "anomaly":
            mask_name = f"candle/Data/Masks/Anomaly/{number:04}.png"
            mask(root / mask_name, value=3)  # VisA counts its regions, it does not write 255
        lines.append(f"candle,{split},{label},{image},{mask_name}")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_mvtec_is_read_as_published(tmp_path: Path) -> None:
    mvtec(tmp_path, "metal_nut")
    mvtec(tmp_path, "bottle")
    categories = read_dataset("mvtec", tmp_path)
    assert [category.name for category in categories] == ["bottle", "metal_nut"]
    nut = categories[1]
    assert len(nut.test) == 8
    assert nut.defective == 6
    assert len(nut.train_good) == 2
    for sample in nut.test:
        if sample.defective:
            assert sample.mask is not None
            assert sample.mask.parts[-2:] == (sample.defect, f"{sample.image.stem}_mask.png")
    assert [category.name for category in read_dataset("mvtec", tmp_path, ["metal_nut"])] == ["metal_nut"]
    with pytest.raises(ConfigError, match="cable"):
        read_dataset("mvtec", tmp_path, ["cable"])


def test_one_set_of_its_own_is_a_category(tmp_path: Path) -> None:
    assert [category.name for category in read_dataset("folder", mvtec(tmp_path))] == ["metal_nut"]


def test_visa_is_read_by_its_list_and_its_masks_are_what_is_above_zero(tmp_path: Path) -> None:
    (candle,) = read_dataset("visa", visa(tmp_path))
    assert (len(candle.test), candle.defective, len(candle.train_good)) == (2, 1, 1)
    defective = next(sample for sample in candle.test if sample.defective)
    assert defective.mask is not None
    assert read_mask(defective.mask).sum() == 20


def test_missing_and_misfit_masks_are_listed_with_their_paths(tmp_path: Path) -> None:
    folder = mvtec(tmp_path)
    (folder / "ground_truth" / "bent" / "001_mask.png").unlink()
    mask(folder / "ground_truth" / "scratch" / "000_mask.png", size=(9, 9))
    mask(folder / "ground_truth" / "scratch" / "777_mask.png")
    with pytest.raises(ConfigError) as caught:
        read_dataset("mvtec", tmp_path)
    for path in ("test/bent/001.png", "scratch/000_mask.png", "scratch/777_mask.png"):
        assert str(folder / path) in str(caught.value) or path in str(caught.value)
    (nut,) = read_dataset("mvtec", tmp_path, tolerate=True)
    assert len(nut.problems) == 3
    assert len(nut.test) == 8  # nothing dropped
    assert sum(sample.has_pixels for sample in nut.test) == 6


def test_two_pictures_for_one_mask_are_a_problem(tmp_path: Path) -> None:
    folder = mvtec(tmp_path)
    picture(folder / "test" / "bent" / "001.jpg")
    with pytest.raises(ConfigError, match=r"2 pictures .*bent/001\.png: shares its mask's name with 001\.jpg"):
        read_dataset("mvtec", tmp_path)
    (nut,) = read_dataset("mvtec", tmp_path, tolerate=True)
    assert [sample.image.name for sample in nut.test if not sample.has_pixels] == ["001.jpg", "001.png"]


def test_pictures_in_sub_folders_have_the_masks_of_theirs(tmp_path: Path) -> None:
    for camera in ("left", "right"):
        picture(tmp_path / "nut" / "test" / "dent" / camera / "000.png")
        mask(tmp_path / "nut" / "ground_truth" / "dent" / camera / "000_mask.png")
    (nut,) = read_dataset("folder", tmp_path)
    assert [sample.mask and sample.mask.parent.name for sample in nut.test] == ["left", "right"]
    (tmp_path / "nut" / "ground_truth" / "dent" / "right" / "000_mask.png").unlink()
    (nut,) = read_dataset("folder", tmp_path, tolerate=True)
    assert [sample.mask and sample.mask.parent.name for sample in nut.test] == ["left", None]


def test_good_parts_may_be_called_ok_or_normal(tmp_path: Path) -> None:
    for kind in ("ok", "ko"):
        picture(tmp_path / "01" / "test" / kind / "0.png")
        mask(tmp_path / "01" / "ground_truth" / kind / "0.png", value=255 if kind == "ko" else 0)
    picture(tmp_path / "01" / "train" / "OK" / "1.png")
    (product,) = read_dataset("folder", tmp_path)
    assert [(sample.defect, sample.mask is None) for sample in product.test] == [("ko", False), ("good", True)]
    assert [path.name for path in product.train_good] == ["1.png"]
    assert not product.problems


def test_what_is_left_out_or_looks_odd_is_said_and_refuses_nothing(tmp_path: Path) -> None:
    folder = mvtec(tmp_path, "bottle")
    mask(folder / "ground_truth" / "bent" / "000_mask.png", value=0)
    picture(folder / "test" / "999.png")
    mvtec(tmp_path / "cable", "cable")
    (tmp_path / "tile" / "test" / "good").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 3
    Image.new("RGB", (12, 10)).save(folder / "test" / "scratch" / "002.png", exif=turned)
    linked = tmp_path / "notes" / "deep"
    linked.mkdir()
    (linked / "screw").symlink_to(folder)
    (bottle,) = read_dataset("mvtec", tmp_path)
    said = sorted(str(problem).removeprefix(f"{tmp_path}/") for problem in bottle.problems)
    assert [text.partition(": ")[0] for text in said] == [
        *("bottle/ground_truth/bent/000_mask.png", "bottle/test/999.png", "bottle/test/scratch/002.png"),
        *("cable", "tile"),
    ]
    assert "is empty" in said[0]
    assert [sample.image.name for sample in bottle.test if not sample.has_pixels] == ["000.png"]
    (screw,) = read_dataset("mvtec", linked)
    assert screw.name == "screw"


def test_a_list_that_is_cut_off_and_a_class_that_is_not_there_are_said(tmp_path: Path) -> None:
    root = visa(tmp_path)
    table = root / "split_csv" / "1cls.csv"
    table.write_text(table.read_text() + "cashew,test,normal,cashew/0.JPG,\ncashew,train,normal,cashew/1.JPG,\n")
    with pytest.raises(ConfigError, match="no picture of cashew is there"):
        read_dataset("visa", root, tolerate=True)
    (candle,) = read_dataset("visa", root, ["candle"])
    assert len(candle.test) == 2
    table.write_text(table.read_text() + "cashew,test,normal\n")
    with pytest.raises(ConfigError, match=r"1cls\.csv: line 7 has too few columns"):
        read_dataset("visa", root)


def test_sets_without_masks_or_without_good_pictures_are_whole(tmp_path: Path) -> None:
    for number in range(2):
        picture(tmp_path / "plain" / "test" / "good" / f"{number}.png")
        picture(tmp_path / "plain" / "test" / "dent" / f"{number}.png")
    picture(tmp_path / "spoilt" / "test" / "dent" / "0.png")
    mask(tmp_path / "spoilt" / "ground_truth" / "dent" / "0.png")  # without the suffix, as some sets have it
    plain, spoilt = read_dataset("folder", tmp_path)
    assert not plain.with_masks
    assert len(plain.test) == 4
    assert not plain.problems
    assert spoilt.with_masks
    assert spoilt.defective == len(spoilt.test) == 1


@pytest.mark.parametrize("kind", ["mvtec", "visa", "folder"])
def test_a_folder_that_is_no_data_set_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=tmp_path.name):
        read_dataset(kind, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is not a folder"):
        read_dataset(kind, tmp_path / "nowhere")  # type: ignore[arg-type]


def test_masks_shrink_as_torchvision_shrinks_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = (rng.random((60, 90)) < 0.2).astype(np.uint8)
    array[20:40, 30:60] = 1
    Image.fromarray(array).save(tmp_path / "m.png")
    ours = read_mask(tmp_path / "m.png", (37, 37))
    theirs = Compose([Resize((37, 37)), ToTensor()])(Image.fromarray(array * 255))[0].numpy() > 0.5
    np.testing.assert_array_equal(ours, theirs)


def test_an_opaque_alpha_channel_is_no_defect(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(tmp_path / "m.png")
    assert not read_mask(tmp_path / "m.png").any()


def test_a_mask_is_what_it_shows(tmp_path: Path) -> None:
    wanted = np.zeros((40, 60), bool)
    wanted[5:25, 10:30] = True
    grey = Image.fromarray(wanted.astype(np.uint8) * 255)
    clear, black = Image.new("L", grey.size, 0), Image.new("RGB", grey.size)
    white = Image.new("RGB", grey.size, (255, 255, 255))
    palette = grey.convert("RGB").quantize(2)
    inverted = palette.copy()  # the other of both has white as number 0, whatever this Pillow does
    inverted.putdata((1 - np.asarray(palette)).ravel().tolist())
    inverted.putpalette([value for n in (1, 0) for value in palette.getpalette()[3 * n : 3 * n + 3]])
    ways = {
        "palette.png": palette,
        "inverted.png": inverted,
        "black_with_alpha.png": Image.merge("RGBA", (*black.split(), grey)),
        "white_with_alpha.png": Image.merge("RGBA", (*white.split(), grey)),
        "red.png": Image.merge("RGB", (grey, clear, clear)),
        "sixteen.png": Image.fromarray(wanted.astype(np.uint16) * 300),
        "one.png": Image.fromarray(wanted.astype(np.uint8)),
        "bit.png": grey.convert("1"),
    }
    for name, drawn in ways.items():
        drawn.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), wanted, err_msg=name)
    grey.save(tmp_path / "lossy.jpg", quality=75)
    assert (read_mask(tmp_path / "lossy.jpg") ^ wanted).mean() < 0.001


def test_a_good_picture_has_an_empty_mask_and_broken_files_are_named(tmp_path: Path) -> None:
    (nut,) = read_dataset("mvtec", mvtec(tmp_path).parent)
    good = next(sample for sample in nut.test if not sample.defective)
    empty = truth(good, read_rgb(good.image).shape[:2], (20, 20))
    assert empty is not None
    assert empty.shape == (20, 20)
    assert not empty.any()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        read_mask(tmp_path / "broken.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        good_pictures(tmp_path / "empty")


def test_the_real_sets_are_read_whole() -> None:
    root = Path(os.environ.get("FLAWLINE_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real pictures in {root}")
    found = {
        category.name: (len(category.test), category.defective, len(category.train_good), category.problems)
        for category in read_dataset("folder", root)
    }
    assert found["ball_screw"] == (40, 25, 10, ())
    assert found["fabric_hsst"] == (26, 25, 0, ())
    assert found["mpdd_metal_plate"] == (101, 71, 20, ())
    assert found["mvtec_transistor"] == (100, 40, 20, ())
