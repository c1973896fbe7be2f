"""A picture's size from its head is the one that the decoder finds, and what is too large is never decoded."""

import io
import itertools
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from flawline.camera.folder import read_picture
from flawline.camera.picture_size import picture_size
from flawline.camera.registry import make_camera
from flawline.config.errors import ImageError
from flawline.config.settings_camera import CameraSettings

HEIGHT, WIDTH = 37, 530


def by_opencv(suffix: str, depth: str = "uint8", channels: int = 3) -> bytes:
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    pixels = np.random.default_rng(1).integers(0, 255, shape).astype(depth)
    done, data = cv2.imencode(suffix, pixels)
    assert done
    return data.tobytes()


def by_pillow(form: str, mode: str = "RGB", **more: Any) -> bytes:
    out = io.BytesIO()
    picture = Image.effect_noise((WIDTH, HEIGHT), 50).convert(mode)
    picture.save(out, form, **more)
    return out.getvalue()


EXIF = Image.Exif()
EXIF[0x010E] = "a part " * 500
FILES = {
    **{f"{end}{n}": by_opencv(end, "uint8", n) for end in (".png", ".jpg", ".bmp", ".tif", ".webp") for n in (1, 3)},
    **{f"{end}16": by_opencv(end, "uint16", n) for end, n in ((".png", 3), (".tif", 3), (".pgm", 1), (".ppm", 3))},
    ".png4": by_opencv(".png", "uint8", 4),
    ".pgm": by_opencv(".pgm", "uint8", 1),
    ".ppm": by_opencv(".ppm"),
    "progressive": by_pillow("JPEG", progressive=True, exif=EXIF, icc_profile=b"x" * 200_000),
    "optimised": by_pillow("JPEG", optimize=True, comment=b"\xff\xc0 not a head"),
    "lossless": by_pillow("WEBP", lossless=True),
    "extended": by_pillow("WEBP", "RGBA", exif=EXIF),
    "lossy": by_pillow("WEBP"),
    "palette": by_pillow("PNG", "P"),
    "bits": by_pillow("TIFF", "1"),
    "lzw": by_pillow("TIFF", compression="tiff_lzw", big_tiff=True),
    "comment": b"P5\n# by hand 7 7\n530 37\n255\n" + bytes(HEIGHT * WIDTH),
    "text": b"P2 530 37 255\n" + b"7 " * (HEIGHT * WIDTH),
    "core": b"BM" + struct.pack("<IHHIIHHHH", 26 + 3 * 532 * HEIGHT, 0, 0, 26, 12, WIDTH, HEIGHT, 1, 24)
    + bytes(1592 * HEIGHT),
    "downwards": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, WIDTH, -HEIGHT, 1, 24, 0, 0, 0, 0, 0, 0)
    + bytes(1592 * HEIGHT),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_head_and_decoder_agree(name: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(FILES[name])
    pixels, _ = read_picture(file)
    assert pixels.shape[:2] == picture_size(FILES[name]) == (HEIGHT, WIDTH)
    assert (read_picture(file, HEIGHT * WIDTH)[0] == pixels).all()
    with pytest.raises(ImageError, match=rf"^{file}: has 0\.0 megapixels, 0\.0196\d* are the most"):
        read_picture(file, HEIGHT * WIDTH - 1)


def test_a_head_that_is_cut_off_is_no_size() -> None:
    for data, length in itertools.product(FILES.values(), (0, 2, 3, 9, 13, 20, 25, 100)):
        assert picture_size(data[:length]) in (None, (HEIGHT, WIDTH))
    assert picture_size(b"#?RADIANCE\n\n-Y 37 +X 530\n") is None


def packed(side: int) -> bytes:
    """A black PNG of this side."""
    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(1 + 3 * side)) for _ in range(side)) + deflate.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_is_too_large_for_the_line_is_a_fault_and_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(packed(6000))
    (tmp_path / "b.png").write_bytes(by_opencv(".png"))
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "c.png").open("r+b").truncate(1 << 34)  # a file of holes
    settings = CameraSettings.model_validate({"name": "top", "backend": "folder", "path": tmp_path})
    with make_camera(settings) as camera:
        camera.most_pixels = 1_000_000
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faults = [frame.fault or "" for frame in (camera.grab(1.0) for _ in range(3)) if frame is not None]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert "a.png: has 36.0 megapixels, 1 are the most" in faults[0]
    assert faults[1] == ""
    assert "c.png: has more bytes than a picture of 1 megapixels" in faults[2]
    assert grown < 50_000  # KiB; decoded it would be 105 000


def test_a_line_takes_no_picture_above_its_largest_frame(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(packed(2000))
    config = tmp_path / "line.toml"
    config.write_text(
        f'[[cameras]]\nname = "top"\nbackend = "folder"\npath = "{tmp_path}"\n[journal]\npath = "state"\n'
        '[worker]\nmax_frame_mpx = 1\nengine = "flawline.models.noop:NoopEngine"\n[preview]\nenabled = false\n'
        f'[publish]\nendpoint = "ipc://{tmp_path}/v"\n[control]\nendpoint = "ipc://{tmp_path}/c"\n'
    )
    command = [sys.executable, "-c", "from flawline.agent.cli import main; main()", "run", "--frames", "1"]
    done = subprocess.run(
        [*command, "--config", config],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    journal = b"".join(file.read_bytes() for file in (tmp_path / "state/line1").glob("journal.sqlite*"))
    assert b"a.png: has 4.0 megapixels, 1 are the most" in journal
