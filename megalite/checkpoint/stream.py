"""Blocks of bytes on their way: some are fetched while others are hashed and written, each on a thread.

None of the three holds the interpreter for long, so a file takes as long as the slowest of them, not as all.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from mmap import PAGESIZE

import numpy as np

Block = bytes | memoryview
BLOCK_BYTES = 1 << 22
DEPTH = 12  # blocks fetched ahead, and that a use may lag behind: a tensor is read while one is written
MAX_BLOCKS = 2 * DEPTH + 2  # in memory at a time


def stream(blocks: Iterable[Block], *uses: Callable[[Block], object]) -> None:
    """Give each block, in order, to each of the uses; what any of them raises is raised here."""
    source = iter(blocks)
    with ExitStack() as stack:
        fetcher, *users = (stack.enter_context(ThreadPoolExecutor(1)) for _ in (None, *uses))
        coming = deque(fetcher.submit(_fetch, source) for _ in range(DEPTH))
        used: deque[Future[object]] = deque()
        while (block := coming.popleft().result()) is not None:
            coming.append(fetcher.submit(_fetch, source))
            used.extend(user.submit(use, block) for user, use in zip(users, uses, strict=True))
            while len(used) > DEPTH * len(uses):
                used.popleft().result()
        for future in used:
            future.result()


def _fetch(source: Iterator[Block]) -> Block | None:
    """The next block, None after the last. Of a mapped file each page is touched: so it is read here."""
    block = next(source, None)
    if block:
        np.frombuffer(block, np.uint8)[::PAGESIZE].max()
    return block
