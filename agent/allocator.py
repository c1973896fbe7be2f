"""How glibc's malloc is set for a process that runs for years with pictures on several threads.

Left alone it gives each thread a heap of its own, and takes pictures out of these heaps once larger ones have been
freed: what one thread has freed the others cannot use, and a heap with something left at its end is never given back.
So resident memory goes on creeping upwards for hours although nothing is kept. See mallopt(3).
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
HEAPS = 2
MAPPED_FROM = 4 << 20
"""Bytes: larger blocks are mapped each for itself, and are given back when they are freed."""
TRIM_FROM = 16 << 20
"""Bytes: so much free room at a heap's end is given back. Less is kept: asking for it again costs page faults."""


def keep_memory_flat() -> bool:
    """Call before threads are started. False where the C library is another one, which is then left as it is."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, HEAPS), (_M_MMAP_THRESHOLD, MAPPED_FROM), (_M_TRIM_THRESHOLD, TRIM_FROM))
    return all(mallopt(key, value) == 1 for key, value in settings)
