"""Allocator settings of the C library."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the kernel; else no effect.

    XLA on a CPU allocates the buffers of every step anew, and the kernel maps large ones page by page: 63,000
    page faults in a step of 12 blocks 128 wide, a fifth of its time. Must be called before any thread starts,
    since threads have heaps of their own.
    """
    most_heaps, most_mappings, trim_threshold = -8, -4, -1  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((most_heaps, 1), (most_mappings, 0), (trim_threshold, -1)):
            mallopt(option, value)
