"""The journal keeps verdicts on the disk: what it holds in memory does not grow with their number."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import ctypes, sys
from pathlib import Path
from flawline.agent.journal import Journal

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

mallinfo = ctypes.CDLL(None).mallinfo2  # glibc 2.33
mallinfo.restype = Mallinfo

def in_use():
    now = mallinfo()
    return now.uordblks + now.hblkhd

def commit(journal, count):
    for _ in range(count // 50):
        verdicts = []
        for _ in range(50):
            header = {"camera": "top", "t_publish": 1, "result": "pass", "padding": "x" * 1000}
            journal.number(header)
            verdicts.append((header, None))
        journal.commit(verdicts)

journal = Journal(Path(sys.argv[1]))
if sys.argv[2] == "as SQLite has it":
    journal.query("PRAGMA cache_size=-2000")
commit(journal, 500)
before = in_use()
commit(journal, 5000)
print(in_use() - before)
"""


def grown(folder: Path, how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_thousands_of_verdicts_take_no_memory(tmp_path: Path) -> None:
    assert grown(tmp_path / "default", "as SQLite has it") > 1_000_000, "else this test shows nothing"
    assert grown(tmp_path / "ours", "as it is") < 200_000
