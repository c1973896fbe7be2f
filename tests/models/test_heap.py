"""The heap of processes that run models: blocks that were freed are used again, not asked of the kernel anew."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from flawline.models.heap import keep_blocks
from flawline.models.switches import Switches
print(keep_blocks(Switches.parse(sys.argv[2:], "test")))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(40_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if sys.argv[1] == "thread":
    faults_here = faults
    def faults():
        found = []
        thread = threading.Thread(target=lambda: found.append(faults_here()))
        thread.start()
        thread.join()
        return found[0]
faults()
print(faults())
"""


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize(("switch", "kept"), [("heap=kept", True), ("heap=plain", False)])
def test_large_blocks_are_used_again(switch: str, kept: bool, where: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, where, switch], capture_output=True, text=True, check=True)
    said, faults = done.stdout.split()
    assert said == str(kept)
    # 40 MB are 10,000 pages: in huge pages 20
    assert (int(faults) < 100) == kept, faults
