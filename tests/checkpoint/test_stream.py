"""Blocks pass in order, at the same time, and not too many of them."""

import threading
import time

import pytest

from megalite.checkpoint.stream import DEPTH, MAX_BLOCKS, stream


def blocks(count: int) -> list[bytes]:
    return [i.to_bytes(2, "little") for i in range(count)]


def test_each_use_gets_every_block_in_order():
    first: list[bytes] = []
    second: list[bytes] = []

    def slow(block):
        time.sleep(0.001)
        second.append(block)

    stream(blocks(5 * MAX_BLOCKS), first.append, slow)
    assert first == second == blocks(5 * MAX_BLOCKS)
    stream([b"", b"a", b""], first.append)  # an empty block is not the end
    assert first[-3:] == [b"", b"a", b""]


def test_no_more_blocks_are_in_memory_than_said():
    given, largest, done = 0, 0, 0

    def source():
        nonlocal given
        for block in blocks(4 * MAX_BLOCKS):
            given += 1
            yield block

    def slow(block):
        nonlocal largest, done
        time.sleep(0.002)
        largest = max(largest, given - done)
        done += 1

    stream(source(), slow, lambda block: None)
    assert DEPTH < largest <= MAX_BLOCKS


def test_fetching_and_both_uses_overlap():
    """Each waits for the other two, which would never come if they took turns."""
    meeting = threading.Barrier(3, timeout=20)

    def source():
        yield b"a"
        meeting.wait()
        yield b"b"

    stream(source(), *[lambda block: block == b"a" and meeting.wait()] * 2)


@pytest.mark.parametrize("where", ["source", "first", "second", "last block"])
def test_what_any_of_them_raises_is_raised(where):
    seen: list[bytes] = []

    def source():
        yield from blocks(3)
        if where == "source":
            raise OSError("full")

    def fail(block):
        if where == "last block" and block != blocks(3)[-1]:
            return
        raise OSError("full")

    uses = {"source": [seen.append], "first": [fail, seen.append]}.get(where, [seen.append, fail])
    with pytest.raises(OSError, match="full"):
        stream(source(), *uses)
