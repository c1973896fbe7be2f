"""`flawline cameras` from outside, with Basler's emulated cameras and Viky, the genicam wheel's GenTL producer."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import genicam
import numpy as np

from flawline.config.sources import load_settings

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()", "cameras"]
CTI = str(Path(genicam.__file__).parent / "viky.cti")


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYLON_CAMEMU": "2"}
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == code, done.stderr
    return done


def test_list_gives_one_object_a_camera_and_a_table() -> None:
    lines = run("list", "--json", "--cti", CTI).stdout.splitlines()
    devices = [json.loads(line) for line in lines]
    assert [device["serial"] for device in devices if device["backend"] == "pylon"] == ["0815-0000", "0815-0001"]
    assert [device["model"] for device in devices if device["backend"] == "gentl"] == ["Viky"] * 3
    table = run("list", "--backend", "pylon").stdout.splitlines()
    assert table[0].split()[:4] == ["backend", "index", "camera", "serial"]
    assert "0815-0001" in table[2]
    assert "--cti" in run("list", "--backend", "gentl", code=2).stderr


def test_snap_by_device_and_by_file(tmp_path: Path) -> None:
    out = tmp_path / "one.png"
    said = run("snap", "--backend", "pylon", "--serial", "0815-0001", "--out", str(out)).stdout
    assert "1024 x 1040, Mono8" in said
    picture = cv2.imread(str(out))
    assert picture is not None
    assert picture.shape == (1040, 1024, 3)
    assert picture.std() > 30
    (tmp_path / "line.toml").write_text(
        '[[cameras]]\nname = "top"\nbackend = "pylon"\nindex = 0\ntrigger = "software"\n'
        'features = {Width = 128, Height = 64}\n[[cameras]]\nname = "side"\nbackend = "pylon"\nindex = 1\n'
    )
    config = str(tmp_path / "line.toml")
    assert "128 x 64" in run("snap", "--config", config, "top", "--out", str(out)).stdout
    wider = run("snap", "--config", config, "top", "--set", "cameras.top.features.Width=256", "--out", str(out))
    assert "256 x 64" in wider.stdout
    assert "top, side" in run("snap", "--config", config, "--out", str(out), code=2).stderr
    assert "no camera 'lid'" in run("snap", "--config", config, "lid", "--out", str(out), code=2).stderr
    missing = run("snap", "--backend", "pylon", "--serial", "X", "--out", str(out), code=1).stderr
    assert missing.count("\n") == 1
    assert "0815-0000" in missing
    assert (
        "cannot be written"
        in run("snap", "--backend", "pylon", "--index", "0", "--out", str(tmp_path / "none" / "x.png"), code=2).stderr
    )


def test_teach_prints_a_table_that_the_file_accepts(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(40, 200, (96, 128, 3), np.uint8)
        cv2.imwrite(str(good / f"{number}.png"), noise)
    config = tmp_path / "line.toml"
    config.write_text(f'[[cameras]]\nname = "top"\nbackend = "folder"\npath = "{good}"\n')
    for source in (["--good", str(good)], ["--frames", "4"]):
        printed = run("teach", "--config", str(config), *source).stdout
        limits = tomllib.loads(printed)["cameras"]["guard"]
        assert (limits["width"], limits["height"]) == (128, 96)
        assert limits["black_level"] == 199 / 2
        assert limits["pixel_format"] == "BGR8"
        taught = tmp_path / "taught.toml"
        taught.write_text(config.read_text() + printed)
        assert load_settings(taught, environ={}).cameras[0].guard.sharpness == limits["sharpness"]
    config.write_text('[[cameras]]\nname = "top"\nbackend = "genicam"\n')
    printed = run("teach", "--config", str(config), "--good", str(good)).stdout
    assert "pixel_format" not in tomllib.loads(printed)["cameras"]["guard"]  # the camera's is not known
    assert "holds no pictures" in run("teach", "--config", str(config), "--good", str(tmp_path / "no"), code=2).stderr


def test_a_name_that_no_camera_may_have_is_one_line(tmp_path: Path) -> None:
    done = run("snap", "a b", "--backend", "folder", "--path", str(tmp_path), "--out", str(tmp_path / "o.png"), code=2)
    assert done.stderr.count("\n") == 1
    assert "name" in done.stderr
