"""How glibc's malloc is set for a process that runs models on the CPU.

Left alone it maps every large block of a layer anew and gives it back after the layer: the kernel zeroes the same
pages again and again, which is a tenth to a fifth of a suspicious frame's time, and more in training. Kept, memory
stays at its peak, which a worker comes back to with every frame. Threads share one heap: those of their own would be
given back whole whenever they are empty. See mallopt(3).
"""

import ctypes

from flawline.models.switches import Switches

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1  # bytes of free room at the heap's end


def keep_blocks(switches: Switches | None = None) -> bool:
    """Call at the start of a process of our own; `switches` as the environment has them, unless given.

    False with `heap=plain`, or where the C library is another one.
    """
    switches = Switches.from_environment() if switches is None else switches
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if switches.heap == "plain" or mallopt is None:
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return all(mallopt(key, value) == 1 for key, value in wanted)
