"""Frames per second and CPU of each camera backend into the frame ring, and the cost of each pixel format.

python tests/bench/cameras.py [--seconds 5] [--json]     what is missing on this machine is left out
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["PYLON_CAMEMU"] = "1"

import cv2
import numpy as np
import structlog

from flawline.camera.camera import EndOfFrames
from flawline.camera.guard import Guard
from flawline.camera.pixel_format import parse
from flawline.camera.pixels import to_rgb8
from flawline.camera.registry import make_camera
from flawline.camera.ring import FrameRing
from flawline.config.errors import FlawlineError
from flawline.config.settings_camera import CameraSettings, GuardSettings

HEIGHT, WIDTH = 1024, 1024
COPIES = {
    "genicam": "2: the library's frame to numpy (it lends no view), numpy to the ring (with the conversion)",
    "pylon": "1: the driver's buffer to the ring (with the conversion)",
    "gentl": "1: the producer's buffer to the ring (with the conversion)",
    "opencv": "3: decoder to BGR, BGR to numpy (OpenCV's retrieve), numpy to the ring (with the conversion)",
    "folder": "2: decoder to numpy, numpy to the ring (with the conversion)",
}
FORMATS = ("Mono8", "Mono10", "Mono10p", "Mono10Packed", "Mono12", "Mono12p", "Mono12Packed", "Mono16")
FORMATS += ("BayerRG8", "BayerRG10", "BayerRG12", "BayerRG12p", "RGB8", "BGR8", "RGBa8", "RGB16", "YUV422_8")


def sources(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Backend and settings of what can be run on this machine; a fake GigE camera lives as long as it is asked for."""
    size = {"Width": WIDTH, "Height": HEIGHT}
    if shutil.which("arv-fake-gv-camera-0.8"):
        fake = subprocess.Popen(["arv-fake-gv-camera-0.8", "-i", "127.0.0.1"], stdout=-3, stderr=-3)
        time.sleep(1)
        try:
            yield "genicam", {"address": "127.0.0.1", "fps": 200, "features": size}
        finally:
            fake.kill()
            fake.wait()
    yield "pylon", {"index": 0, "fps": 1000, "features": {**size, "ExposureTime": 100}}
    with contextlib.suppress(ImportError):
        import genicam

        cti = Path(genicam.__file__).with_name("viky.cti")
        if cti.exists():  # 800 x 800 is the largest this producer gives
            yield "gentl", {"cti": cti, "serial": "0", "fps": 200, "features": {"Width": 800, "Height": 800}}
    noise = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 2)
    video = cv2.VideoWriter(str(folder / "a.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30, (WIDTH, HEIGHT))
    for shift in range(20):
        video.write(np.roll(noise, 7 * shift, 1))
    video.release()
    yield "opencv", {"path": folder / "a.avi", "loop": True}
    (folder / "pictures").mkdir()
    for shift in range(5):
        cv2.imwrite(str(folder / "pictures" / f"{shift}.png"), np.roll(noise, 7 * shift, 1))
    yield "folder", {"path": folder / "pictures", "loop": True}


def run(backend: str, keys: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Grab and convert into the ring for so long, as the agent's camera thread does."""
    settings = CameraSettings.model_validate({"name": "bench", "backend": backend, **keys})
    ring = FrameRing(2, 4 * HEIGHT * WIDTH)
    slot = ring.acquire()
    assert slot is not None
    frames = faults = 0
    form = ""
    with make_camera(settings) as camera:
        while camera.grab(1.0) is None:
            pass
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            try:
                frame = camera.grab(0.25)
            except EndOfFrames:
                break
            if frame is None or frame.pixels is None:
                faults += frame is not None
                continue
            height, width = frame.size
            to_rgb8(frame.pixels, frame.pixel_format, ring.picture(slot, height, width))
            frames, form = frames + 1, f"{width} x {height} {frame.pixel_format}"
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ring.close()
    return {
        "backend": backend,
        "form": form,
        "fps": round(frames / wall, 1),
        "cpu_ms_per_frame": round(1000 * cpu / max(frames, 1), 2),
        "lost_or_incomplete": faults,
        "copies": COPIES[backend],
    }


def sample(name: str, rng: np.random.Generator) -> np.ndarray:
    """Random pixels of that format, as they lie in memory."""
    known = parse(name)
    if known.packed:
        return rng.integers(0, 256, known.bytes_of(HEIGHT, WIDTH), np.uint8)
    shape = (HEIGHT, WIDTH) if known.channels == 1 else (HEIGHT, WIDTH, known.channels)
    return rng.integers(0, 2**known.bits, shape, np.uint16 if known.bits > 8 else np.uint8)


def best_ms(work: Any, repeats: int = 15) -> float:
    """The quickest of some runs, in ms: what the work costs where nothing disturbs it."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(1000 * min(times), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    backends = []
    with tempfile.TemporaryDirectory() as folder:
        for backend, keys in sources(Path(folder)):
            try:
                backends.append(run(backend, keys, options.seconds))
            except FlawlineError as error:
                print(f"{backend}: left out: {error}")
    rng, out = np.random.default_rng(1), np.empty((HEIGHT, WIDTH, 3), np.uint8)
    formats = {}
    for name in FORMATS:
        pixels = sample(name, rng)
        formats[name] = best_ms(lambda pixels=pixels, name=name: to_rgb8(pixels, name, out))
    guard = Guard(CameraSettings(name="bench", backend="genicam", guard=GuardSettings(sharpness=1e-6, frozen_after=0)))
    out[:] = rng.integers(0, 200, out.shape, np.uint8)
    guard_ms = best_ms(lambda: guard.check(out, "Mono8"))
    if options.json:
        print(json.dumps({"backends": backends, "convert_ms": formats, "guard_ms": guard_ms}))
        return
    for row in backends:
        print(f"{row['backend']:8} {row['form']:22} {row['fps']:7} frames/s {row['cpu_ms_per_frame']:6} ms CPU a frame")
        print(f"{'':8} copies {row['copies']}; lost or incomplete: {row['lost_or_incomplete']}")
    print(f"\nto RGB8, {WIDTH} x {HEIGHT} pixels, ms:")
    print("  ".join(f"{name} {ms}" for name, ms in formats.items()))
    print(f"guard with sharpness, ms: {guard_ms}")


if __name__ == "__main__":
    main()
