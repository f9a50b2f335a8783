"""Blocks to token ids, in order, by as many worker processes as there are cores for it."""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from typing import Protocol

import numpy as np

from megalite.data.blocks import Block
from megalite.data.documents import Encoder, encode_documents
from megalite.data.error import DataError

_INTERRUPTIONS = {signal.SIGINT, signal.SIGTERM}
_SECONDS_BETWEEN_LOOKS = 2.0
_BLOCKS_IN_FLIGHT = 6  # for each worker: it never waits, and memory stays flat


class EncoderSource(Protocol):
    """Where a tokenizer comes from: small, hashable, and sent to each worker, which loads it."""

    def load(self) -> Encoder: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Recipe:
    """How blocks become ids; the same for all workers."""

    tokenizer: EncoderSource
    keys: tuple[str, ...]
    append_eod: bool
    vocab_size: int
    dtype: np.dtype
    max_record_bytes: int


@dataclass
class Encoded:
    """What became of a block: for each key ids back to back and document lengths; and what was left out."""

    rows: list[tuple[np.ndarray, np.ndarray]]
    num_records: int
    bad_records: list[tuple[int, str]]


def encode_in_order(
    recipe: Recipe, blocks: Iterable[Block], workers: int
) -> Generator[tuple[Block, Encoded], None, None]:
    """Blocks with their ids, in order; with 0 workers by this process itself. Close it when stopping early.

    Raises DataError for an id that the recipe does not allow, and when a worker process dies.
    """
    if workers == 0:
        return ((block, encode_block(recipe, block)) for block in blocks)
    return _encode_in_processes(recipe, blocks, workers)


def encode_block(recipe: Recipe, block: Block) -> Encoded:
    """Read, encode."""
    found = block.read(recipe.keys, recipe.max_record_bytes)
    names = [block.describe(record) for record in found.records]
    how = (_loaded(recipe.tokenizer), recipe.dtype, recipe.append_eod, recipe.vocab_size, names)
    rows = [encode_documents(texts, *how) for texts in found.texts]
    return Encoded(rows, found.num_records, found.bad_records)


@cache
def _loaded(tokenizer: EncoderSource) -> Encoder:
    """One for each process."""
    return tokenizer.load()


def _encode_in_processes(
    recipe: Recipe, blocks: Iterable[Block], workers: int
) -> Generator[tuple[Block, Encoded], None, None]:
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (recipe,))
    flying: deque[tuple[Block, Future[Encoded]]] = deque()
    try:
        for block in blocks:
            with _signals_waiting():
                flying.append((block, pool.submit(encode_block, recipe, block)))
            if len(flying) >= _BLOCKS_IN_FLIGHT * workers:
                done, future = flying.popleft()
                yield done, future.result()
        while flying:
            done, future = flying.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        remedy = "perhaps out of memory: lower --workers or --max-record-mib"
        raise DataError(f"a worker process died: {remedy}") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_waiting() -> Iterator[None]:
    """Hold interruptions back: one in the middle of the pool's queues could leave a lock held for ever.

    A handler does it, not a mask: other threads take signals too, and the main thread is interrupted.
    """
    arrived: list[int] = []

    def hold(number: int, frame: object) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, hold) for number in _INTERRUPTIONS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in arrived:
            signal.raise_signal(caught)


def _start_worker(recipe: Recipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    parent = parent_process()  # os.getppid() may be another one already
    assert parent is not None
    signal.signal(signal.SIGALRM, partial(_exit_without_parent, parent.pid))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS)
    _loaded(recipe.tokenizer)


def _exit_without_parent(parent: int | None, *_: object) -> None:
    """A parent that was killed cannot stop its workers; they would wait for work forever.

    An alarm looks after it, not a thread: a process with a second thread allocates memory behind locks, and
    `tokenizers` is then 7 % slower.
    """
    if os.getppid() != parent:
        os._exit(1)
