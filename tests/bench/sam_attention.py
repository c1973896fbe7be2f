"""SAM's ViT encoder with each way of its attention: times in turns, and the largest memory of a process for each.

    python tests/bench/sam_attention.py [--size vit_b] [--input 1024] [--rounds 2] [--threads 1] [--device cpu]
        [--precision fp32]

Random weights, for time does not depend on them. `early` is `mask` with windows padded before the projection, as
segment_anything has it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn

from flawline.models.bundle import SamSettings
from flawline.models.sam import build_sam
from flawline.models.sam_attention import FusedBlock, fuse_attention
from flawline.models.towers import PRECISIONS

WAYS = ("plain", "mask", "extended", "early")


class EarlyPadding(FusedBlock):
    """Pads and cuts windows before the projection to queries, keys and values, and joins them after the last one."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        size, pad = inner.shape[1:3], None
        if self.window:
            inner, pad = window_partition(inner, self.window)
        inner = self.attn.proj(self._attention(self.attn.qkv(inner)))
        if self.window:
            inner = window_unpartition(inner, self.window, pad, tuple(size))
        x = x + inner
        return x + self.mlp(self.norm2(x))


def measure(way: str, given: argparse.Namespace) -> None:
    """One forward after one to warm up, on standard output."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    settings = SamSettings(architecture=given.size, checkpoint="none", input_size=given.input)
    encoder = build_sam(settings).image_encoder.to(given.device, PRECISIONS[given.precision])
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.1)
    fuse_attention(encoder, "mask" if way == "early" else way)
    if way == "early":
        for block in encoder.blocks:
            block.__class__ = EarlyPadding
    picture = torch.randn(1, 3, given.input, given.input).to(given.device, PRECISIONS[given.precision])
    cuda = given.device != "cpu"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.inference_mode():
        for _ in range(4 if cuda else 1):
            encoder(picture)
        if cuda:
            torch.cuda.synchronize()
        wall, used = time.perf_counter(), time.process_time()
        encoder(picture)
        if cuda:
            torch.cuda.synchronize()
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(
        json.dumps(
            {
                "ms": round(1000 * (time.perf_counter() - wall)),
                "processor_ms": round(1000 * (time.process_time() - used)),
                "before_mib": round(before),
                "peak_mib": round(peak),
            }
        )
    )


def main() -> None:
    """Each way in a process of its own, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_b", choices=["vit_b", "vit_l", "vit_h"])
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=list(PRECISIONS))
    parser.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    given = parser.parse_args()
    if given.way:
        measure(given.way, given)
        return
    for _ in range(given.rounds):
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--way", way]
            print(
                f"{way:9}",
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(),
                flush=True,
            )


if __name__ == "__main__":
    main()
