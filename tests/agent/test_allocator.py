"""What malloc is told at the agent's start does what it is told for: memory that was freed is given back."""

import subprocess
import sys

PROGRAM = """
import sys, threading
import numpy as np
from flawline.agent.allocator import MAPPED_FROM, keep_memory_flat

if sys.argv[1] == "set":
    assert keep_memory_flat()

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def work():
    np.ones(3 * MAPPED_FROM, np.uint8)  # freed: by this glibc learns to take such blocks from its heaps
    large = [np.ones(2 * MAPPED_FROM, np.uint8) for _ in range(8)]
    last.append(np.ones(1000, np.uint8))  # stays, at the heap's end

last = []
before = resident_mb()
for _ in range(4):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(resident_mb() - before)
"""


def grown_mb(how: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_freed_pictures_are_given_back_whatever_lies_behind_them() -> None:
    assert grown_mb("left alone") > 30, "else this test shows nothing"
    assert grown_mb("set") < 8
