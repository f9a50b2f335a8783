"""Collectives through shared memory say what gloo's do, which share no code with them, in any order."""

import gc
import os
import time
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megalite.parallel import node_memory, reach
from megalite.parallel.mappings import (
    start_all_gather,
    start_all_reduce,
    start_exchange,
    start_reduce_scatter,
    wait_for,
)
from megalite.parallel.node_memory import Exchange, share_memory
from megalite.parallel.slots import SLOT_BYTES, SLOTS
from tests.harness import run_distributed

STARTS = [start_all_reduce, start_all_gather, start_exchange, start_reduce_scatter]
NUMBERS = [torch.float64, torch.float32, torch.bfloat16, torch.int64]
SHAPES = [(), (1,), (3, 5), (7, 1, 33)]


@pytest.fixture(params=[2, 3, 4])
def size(request):
    return request.param


def sharing_group(size):
    """A group that shares memory, and the same ranks without."""
    shared, plain = dist.new_group(range(size)), dist.new_group(range(size))
    share_memory([shared, None])
    return shared, plain


def drawn(seed, rank, shape, dtype):
    """Whole numbers, whose sums no format rounds."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def everything_equals_gloo(rank, size):
    shared, plain = sharing_group(size)
    for seed, (start, dtype, shape) in enumerate(
        (start, dtype, shape) for start in STARTS for dtype in NUMBERS for shape in SHAPES
    ):
        if start in (start_exchange, start_reduce_scatter):
            shape = (size, *shape)
        elif start is start_all_gather and not shape:
            continue
        x = drawn(seed, rank, shape, dtype)
        inputs = [x] if x.dim() < 2 else [x, x.transpose(-1, -2).contiguous().transpose(-1, -2)]
        for tensor in inputs:
            before = tensor.clone()
            (ours, work), (theirs, their_work) = start(tensor, shared), start(tensor, plain)
            assert isinstance(work, Exchange)
            assert not isinstance(their_work, Exchange)
            wait_for(work)
            wait_for(their_work)
            assert torch.equal(ours, theirs), (start, dtype, shape)
            assert ours.dtype == dtype
            assert torch.equal(tensor, before), "the input was changed"


def test_every_collective_equals_gloos(size):
    run_distributed(everything_equals_gloo, size, size)


def sums_are_equal_everywhere(rank, size):
    shared, _ = sharing_group(size)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(rank)) * 10.0**rank
    total, work = start_all_reduce(x, shared)
    wait_for(work)
    return total


def test_a_sum_is_equal_to_the_last_bit_on_all_ranks():
    """In the order of ranks, which is written out here: another order would round otherwise."""
    terms = [torch.randn(1000, generator=torch.Generator().manual_seed(r)) * 10.0**r for r in range(4)]
    expected = ((terms[0] + terms[1]) + terms[2]) + terms[3]
    assert not torch.equal(expected, terms[0] + (terms[1] + (terms[2] + terms[3])))
    for total in run_distributed(sums_are_equal_everywhere, 4, 4):
        assert torch.equal(total, expected)


def many_are_begun_before_any_is_waited_for(rank, size):
    """Each rank waits in an order of its own, for three times as many as there are slots."""
    shared, plain = sharing_group(size)
    begun = []
    for number in range(3 * SLOTS + 1):
        start = STARTS[number % len(STARTS)]
        x = drawn(number, rank, (size, 2, 3), torch.float64)
        begun.append((start(x, shared), start(x, plain)))
        if rank == number % size:
            time.sleep(0.01)  # others run ahead, as far as there are slots
    for number in torch.randperm(len(begun), generator=torch.Generator().manual_seed(rank)).tolist():
        (ours, work), (theirs, their_work) = begun[number]
        wait_for(work)
        wait_for(work)  # once more changes nothing
        wait_for(their_work)
        assert torch.equal(ours, theirs), number


def test_many_may_be_begun_and_are_waited_for_in_any_order(size):
    run_distributed(many_are_begun_before_any_is_waited_for, size, size)


def a_slow_reader_still_reads_what_was_said(rank, size):
    shared, _ = sharing_group(size)
    for number in range(4 * SLOTS):
        if rank == size - 1:
            time.sleep(0.005)
        full, work = start_all_gather(torch.full((1000,), number * size + rank), shared)
        wait_for(work)
        expected = torch.arange(number * size, (number + 1) * size).repeat_interleave(1000)
        assert torch.equal(full, expected)


def test_a_slot_is_written_again_only_when_all_have_read_it(size):
    run_distributed(a_slow_reader_still_reads_what_was_said, size, size)


def the_oldest_is_read_last(rank, size):
    """Rank 0 runs ahead by one exchange while the others have read all but the oldest."""
    shared, _ = sharing_group(size)
    begun = [start_all_gather(torch.tensor([10 * number + rank]), shared) for number in range(SLOTS)]
    for number in reversed(range(rank > 0, SLOTS)):
        wait_for(begun[number][1])
    if rank:
        time.sleep(0.2)
        wait_for(begun[0][1])
    following, work = start_all_gather(torch.tensor([10 * SLOTS + rank]), shared)
    wait_for(work)
    return [full.tolist() for full, _ in (*begun, (following, None))]


def test_a_slot_that_is_read_last_is_not_written_before(size):
    expected = [[10 * number + rank for rank in range(size)] for number in range(SLOTS + 1)]
    assert run_distributed(the_oldest_is_read_last, size, size) == [expected] * size


def what_does_not_fit_is_left_to_the_backend(rank, size):
    """As many bytes as a slot has, in all slots at once, and one more."""
    shared, _ = sharing_group(size)
    found = []
    for start, entries in ((start_all_gather, 1), (start_reduce_scatter, size - 1)):
        for more in (0, 1):
            count = SLOT_BYTES // entries + more
            shape = (count,) if entries == 1 else (size, count)
            begun = [
                start(torch.full(shape, number + rank, dtype=torch.uint8), shared) for number in range(SLOTS)
            ]
            for number, (result, work) in enumerate(begun):
                wait_for(work)
                terms = torch.arange(number, number + size, dtype=torch.uint8)
                expected = terms if entries == 1 else terms.sum()
                assert (result.view(-1, count) == expected.view(-1, 1)).all()
            found.append(isinstance(work, Exchange))
    return found


def test_what_does_not_fit_is_left_to_the_backend():
    assert run_distributed(what_does_not_fit_is_left_to_the_backend, 3, 3) == [[True, False] * 2] * 3


def out_of_reach(rank, size, place, name, value):
    """Whether a group shares memory where the last rank is elsewhere; and descriptors left open."""
    group = dist.new_group(range(size))
    dist.barrier(group)
    before = len(os.listdir("/proc/self/fd"))
    with patch.object(place, name, value if rank == size - 1 else getattr(place, name)):
        share_memory([group])
    left = len(os.listdir("/proc/self/fd")) - before
    full, work = start_all_gather(torch.tensor([rank]), group)
    wait_for(work)
    assert full.tolist() == list(range(size))
    return isinstance(work, Exchange), left


def fails(*_):
    raise OSError("Too many open files")


OPENS, MAKES = reach._opened, os.memfd_create
ELSEWHERE = {
    "another node": (reach, "_kernel", lambda: ("another boot", "pid:[1]")),
    "no /proc": (reach, "_kernel", lambda: None),
    "no pipes": (os, "pipe", fails),
    "no such memory": (os, "memfd_create", fails),
    "others' processes are closed to it": (os, "readlink", fails),
    "another process has its number": (os, "memfd_create", lambda name: MAKES("another's")),
    "pipes are closed to it": (os, "open", fails),
}


@pytest.mark.parametrize("why", ELSEWHERE)
def test_where_one_rank_cannot_none_does(why):
    assert run_distributed(out_of_reach, 3, 3, *ELSEWHERE[why]) == [(False, 0)] * 3


def test_the_patch_by_itself_changes_nothing():
    """Control: all share, and each keeps two pipes and the memory of three for each of the others."""
    found = run_distributed(out_of_reach, 3, 3, reach, "_opened", OPENS)
    assert found == [(True, 2 * 2 + 3)] * 3


def test_large_groups_do_not_share():
    assert run_distributed(out_of_reach, 3, 3, reach, "_opened", OPENS)[0][0]
    with patch.object(reach, "LARGEST_GROUP", 2):
        assert run_distributed(out_of_reach, 3, 3, reach, "_opened", OPENS) == [(False, 0)] * 3


def ends(rank, size, when):
    """Rank 0 lets go of its pipes, as a process that ends does. What the other finds."""
    shared, _ = sharing_group(size)
    if rank == 0:
        if when == "after it has read":
            wait_for(start_all_reduce(torch.ones(1), shared)[1])
        if when == "while it is waited for":
            time.sleep(0.3)
        del node_memory._SHARED[shared]
        dist.barrier()
        return ""
    try:
        if when == "before":
            dist.barrier()
        total, work = start_all_reduce(torch.ones(1), shared)
        if when == "after it has read":
            dist.barrier()
        wait_for(work)
    except dist.DistBackendError as error:
        return str(error)
    finally:
        if when == "while it is waited for":
            dist.barrier()
    return total.item()


@pytest.mark.parametrize("when", ["before", "while it is waited for"])
def test_a_rank_that_ends_is_named(when):
    _, told = run_distributed(ends, 2, 2, when)
    assert told == "rank 0 of a group of 2 on this node has ended"


def test_a_rank_may_end_when_it_has_read_all():
    assert run_distributed(ends, 2, 2, "after it has read") == ["", 2.0]


def is_silent(rank, size):
    shared, _ = sharing_group(size)
    told = ""
    if rank == 1:
        with patch.object(node_memory, "LONGEST_WAIT", timedelta(seconds=0.2)):
            try:
                wait_for(start_all_reduce(torch.ones(1), shared)[1])
            except dist.DistBackendError as error:
                told = str(error)
    dist.barrier()
    return told


def test_a_rank_that_is_silent_is_named():
    _, told = run_distributed(is_silent, 2, 2)
    assert told == "rank 0 of a group of 2 on this node has said nothing for 0.2 s"


def goes_with_its_group(rank, size):
    before = len(os.listdir("/proc/self/fd"))
    group = dist.new_group(range(size))
    share_memory([group])
    memory = node_memory._SHARED[group]
    assert memory.size == size
    del memory
    dist.barrier()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert len(node_memory._SHARED) == 0
    return len(os.listdir("/proc/self/fd")) - before


def test_memory_goes_with_its_group():
    assert run_distributed(goes_with_its_group, 2, 2) == [0, 0]
