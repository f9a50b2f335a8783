"""The C allocator of a process on a CPU: what is freed goes back to the system.

glibc keeps freed memory in its heap, and blocks of up to 32 MiB go there. torch asks for aligned blocks,
which glibc before 2.38 hardly uses again once freed: a process then holds several times what is alive in it.
A block that is mapped for itself is unmapped when it is freed; the price is that the system zeroes its pages.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def map_large_blocks(threshold_bytes: int) -> bool:
    """Let blocks of so many bytes and more be mapped each; False where the C library has no such choice.

    For the rest of the process; blocks that are there stay as they are.
    """
    libc = _glibc()
    if libc is None:
        return False
    # Either switches off glibc's own rule, by which the first is raised to the largest block freed so far.
    settings = {_M_MMAP_THRESHOLD: threshold_bytes, _M_TRIM_THRESHOLD: threshold_bytes}
    return all(libc.mallopt(name, value) for name, value in settings.items())


def give_back() -> None:
    """Return what is free in the C library's heap to the system, as far as it is whole pages."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
