"""Keeps the memory that a training step frees on a CPU for the step after it."""

import ctypes
import sys

# Of <malloc.h>: up to which size blocks come from the heap, how much of its free end it keeps, by how much it grows.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tells glibc's malloc, for the whole process, not to give large free blocks back to the system.

    XLA's temporary buffers are allocated anew in every step; the system would clear their pages each time, which took
    a third of the CPU time of small models. Called by the command line, not by the library: it is the process's choice.

    Returns:
      whether there is such a malloc here.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return all(mallopt(option, value) == 1 for option, value in settings)
