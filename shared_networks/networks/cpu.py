"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let this process keep large blocks that it freed, for the next step or window, instead of giving them back.

    The tensors of a step on the CPU are so large that glibc asks the system for each of them anew, page by page: a
    fifth of a pre-training step and a quarter of a segmentation window, measured by `tests.benchmarks`. The resident
    size then stays near its peak. Other C libraries are left as they are; blocks of GPUs are PyTorch's own matter.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)  # large blocks come from the heap, where they can be used again
        mallopt(_TRIM_THRESHOLD, -1)  # and its end is not given back
