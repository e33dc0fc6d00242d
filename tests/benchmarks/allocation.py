"""What glibc does with freed memory by itself, beside :func:`shared_networks.networks.cpu.keep_freed_memory`."""

from __future__ import annotations

import ctypes
import platform

from shared_networks.networks.cpu import keep_freed_memory


def set_allocation(published: bool) -> None:
    """Give large freed blocks back to the system, as a process does that asks for nothing else, or keep them."""
    if not published:
        keep_freed_memory()
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 65536)  # M_MMAP_MAX, glibc's default
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD and
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD, where its own adjustment ends up after large blocks
        libc.malloc_trim(0)
