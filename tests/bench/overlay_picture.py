"""A picture of six failed parts as the running agent outlined them: a folder is replayed, verdicts and masks received.

    python tests/bench/overlay_picture.py ../shared/data/fabric_hsst/test/defect docs/overlay.jpg [--bundle demo]

Of all verdicts with defects six are taken, evenly over the folder; the marks are those of the MJPEG stream.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zmq

from flawline.agent.shot import burnt, jpeg, take
from flawline.agent.wire import unpack
from flawline.camera.folder import list_pictures

CLI = [sys.executable, "-c", "from flawline.agent.cli import main; main()"]
EDGE = 307
ACROSS, DOWN = 3, 2


def replayed(pictures: Path, bundle: str, count: int) -> tuple[list[dict[str, Any]], dict[int, np.ndarray]]:
    """Verdicts of every picture, and by their number the masks."""
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        config = Path(folder) / "line.toml"
        config.write_text(
            f'[[cameras]]\nname = "replay"\nbackend = "folder"\npath = "{pictures.resolve()}"\nfps = 1000.0\n'
            f'[publish]\nendpoint = "ipc://{folder}/verdicts"\n[control]\nendpoint = "ipc://{folder}/control"\n'
            f'[model]\nbundle = "{bundle}"\n[journal]\npath = "state"\n[preview]\nenabled = false\n'
        )
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVTIMEO, 600_000)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        for topic in ("verdict/", "mask/"):
            socket.subscribe(topic)
        socket.connect(f"ipc://{folder}/verdicts")
        agent = subprocess.Popen([*CLI, "run", "--config", str(config)], stderr=subprocess.DEVNULL)
        verdicts: list[dict[str, Any]] = []
        masks: dict[int, np.ndarray] = {}
        try:
            while len(verdicts) < count or any(one["result"] == "fail" and one["seq"] not in masks for one in verdicts):
                topic, header, *payload = socket.recv_multipart()
                message = unpack(header)
                if topic.startswith(b"verdict/"):
                    verdicts.append(message)
                else:
                    file = np.frombuffer(payload[0], np.uint8)
                    masks[message["seq"]] = np.asarray(cv2.imdecode(file, cv2.IMREAD_GRAYSCALE), np.uint8)
        finally:
            agent.terminate()
            agent.wait(60)
            socket.close(0)
    return verdicts, masks


def main() -> None:
    """Replay, choose, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bundle", default="demo")
    given = parser.parse_args()
    files = list_pictures(given.pictures)
    verdicts, masks = replayed(given.pictures, given.bundle, len(files))
    failed = sorted((one for one in verdicts if one["defects"]), key=lambda one: int(one["frame_id"]))
    print(f"{len(files)} pictures, {len(verdicts)} verdicts, {len(failed)} with defects")
    if len(failed) < ACROSS * DOWN:
        raise SystemExit(f"fewer than {ACROSS * DOWN} pictures with defects")
    tiles = []
    for place in np.linspace(0, len(failed) - 1, ACROSS * DOWN).round().astype(int):
        verdict = failed[place]
        picture = np.asarray(cv2.imread(str(files[verdict["frame_id"]]))[:, :, ::-1])
        shot = take(verdict, np.ascontiguousarray(picture), masks[verdict["seq"]], None, [], 2 * EDGE)
        tiles.append(cv2.resize(burnt(shot), (EDGE, EDGE), interpolation=cv2.INTER_AREA))
    rows = [np.hstack(tiles[row * ACROSS : (row + 1) * ACROSS]) for row in range(DOWN)]
    given.file.write_bytes(jpeg(np.vstack(rows), 88))


if __name__ == "__main__":
    main()
