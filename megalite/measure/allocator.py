"""The C allocator of a process on a CPU: whether what is freed goes back to the system.

glibc keeps freed memory in its heap, and blocks of up to 32 MiB go there. torch asks for aligned blocks,
which glibc before 2.38 hardly uses again once freed: a process then holds more than what is alive in it.
A block that is mapped for itself is unmapped when it is freed; the price is that the system zeroes its pages
whenever one is asked for: a tenth of a step or more.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h
_NEVER, _AHEAD_BYTES, _MOST_MAPS = -1, 64 << 20, 65536
# Not by a high _M_MMAP_THRESHOLD: before 2.35 glibc takes at most 32 MiB.
KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: _AHEAD_BYTES}
MAPPED_BLOCK_MIB = 4
ROOM = 4  # times what is planned: kept blocks were found to take up to 1.6 times as much


def mapped_block_mib(stated: int | None, planned_bytes: int, node_bytes: int) -> int:
    """MiB from which on blocks go back when they are freed; 0 for none, which is faster and takes more.

    stated: by the configuration; None goes by what is planned for all ranks of a node, and its memory.
    """
    if stated is not None:
        return stated
    return 0 if ROOM * planned_bytes <= node_bytes else MAPPED_BLOCK_MIB


def settle_blocks(mib: int) -> bool:
    """Let blocks of so many MiB and more be mapped each, or with 0 keep all that are freed to use them again.

    For the rest of the process; blocks that are there stay as they are. False where the C library has no such
    choice; glibc before 2.35 has none above 32 MiB.
    """
    threshold = mib << 20
    give = {_M_MMAP_MAX: _MOST_MAPS, _M_MMAP_THRESHOLD: threshold, _M_TRIM_THRESHOLD: threshold}
    return _set(give if mib else KEEP)


def _set(settings: dict[int, int]) -> bool:
    """Any of them ends glibc's own rule, by which thresholds follow the largest block freed so far."""
    libc = _glibc()
    return libc is not None and all(libc.mallopt(name, value) for name, value in settings.items())


def give_back() -> None:
    """Return what is free in the C library's heap to the system, as far as it is whole pages."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
