"""Memory of weights on a CPU, which lie together in large pages where the system has them.

A token reads every weight once. In pages of 4 KB the processor looks up a page for each row or two, and most such weights
are too small for a library's own allocation to ask for larger ones.
"""

import mmap
import threading

import numpy as np

LEAST, MOST = 1 << 16, 1 << 24  # bytes of an array that is brought here; numpy asks for large pages for still larger ones
REGION, ALIGNED = 1 << 26, 64  # bytes of memory that is asked for at a time, and what arrays begin at

_lock = threading.Lock()
_region, _used = None, REGION


def in_large_pages(array):
    """A copy of a contiguous array in large pages, or the array where it is too small or too large or there are none.

    Memory is the system's again when nothing of its 64 MB is referred to.
    """
    if not LEAST <= array.nbytes <= MOST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return array
    result = _take(array.nbytes).view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def _take(size):
    """So many bytes, uint8."""
    global _region, _used
    with _lock:
        if _used + size > REGION:
            memory = mmap.mmap(-1, REGION, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            _region, _used = np.frombuffer(memory, np.uint8), 0
        part = _region[_used:_used + size]
        _used += -(-size // ALIGNED) * ALIGNED
        return part
