"""How the C library manages memory."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Has the C library keep freed memory for the next step instead of giving it back; for Linux with glibc.

    XLA on a CPU allocates the buffers of a step anew each time, and large ones come from the kernel page by
    page: 63,000 page faults in a step of 12 blocks 128 wide, a fifth of its time. Has to come before anything
    that starts threads, which would have heaps of their own.
    """
    most_heaps, most_mappings, trim_threshold = -8, -4, -1  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((most_heaps, 1), (most_mappings, 0), (trim_threshold, -1)):
            mallopt(option, value)
