"""Blocks encoded in order, by as many worker processes as there are cores for it."""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process

from megalite.data.encoding import Encoded, EncodingPlan, encode_block, load_encoder
from megalite.data.error import DataError
from megalite.data.input_block import InputBlock

_INTERRUPTIONS = {signal.SIGINT, signal.SIGTERM}
_SECONDS_BETWEEN_LOOKS = 2.0
_BLOCKS_IN_FLIGHT = 6  # per worker: it never waits, and memory stays flat


def encode_in_order(
    plan: EncodingPlan, blocks: Iterable[InputBlock], workers: int
) -> Generator[tuple[InputBlock, Encoded], None, None]:
    """Blocks with their ids, in order; with 0 workers by this process itself. Close it when stopping early.

    Raises DataError for an id that the plan does not allow, and when a worker process dies.
    """
    if workers == 0:
        return ((block, encode_block(plan, block)) for block in blocks)
    return _encode_in_processes(plan, blocks, workers)


def _encode_in_processes(
    plan: EncodingPlan, blocks: Iterable[InputBlock], workers: int
) -> Generator[tuple[InputBlock, Encoded], None, None]:
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (plan,))
    flying: deque[tuple[InputBlock, Future[Encoded]]] = deque()
    try:
        for block in blocks:
            with _signals_waiting():
                flying.append((block, pool.submit(encode_block, plan, block)))
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


def _start_worker(plan: EncodingPlan) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    parent = parent_process()  # os.getppid() may be another one already
    assert parent is not None
    signal.signal(signal.SIGALRM, partial(_exit_without_parent, parent.pid))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS)
    load_encoder(plan.tokenizer)


def _exit_without_parent(parent: int | None, *_: object) -> None:
    """A parent that was killed cannot stop its workers; they would wait for work forever.

    An alarm looks after it, not a thread: a process with a second thread allocates memory behind locks, and
    `tokenizers` is then 7 % slower.
    """
    if os.getppid() != parent:
        os._exit(1)
