"""A sequence cut over ranks: every place once, equal work, there and back; and parts that go round."""

import re

import pytest
import torch

from megalite.parallel.circulation import Gather, Ring
from megalite.parallel.context import ParallelContext, Ranks
from megalite.parallel.sequence import SequenceCut
from megalite.parallel.topology import Topology
from tests.harness import run_distributed

SIZES = [1, 2, 3, 4, 7]


def cuts_of(size, chunk_length=3):
    length = chunk_length * (2 * size if size > 1 else 1)
    return [SequenceCut(length, Ranks(("cp",), None, size, rank)) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_every_place_is_on_one_rank_and_back_in_its_order(size):
    cuts, whole = cuts_of(size), torch.arange(2 * cuts_of(size)[0].length).view(2, -1)
    places = torch.cat([cut.places for cut in cuts])
    assert sorted(places.tolist()) == list(range(cuts[0].length))
    gathered = torch.cat([cut.part(whole, dim=1) for cut in cuts], dim=1)
    for cut in cuts:
        assert torch.equal(cut.by_rank(whole, dim=1), gathered)
        assert torch.equal(cut.in_order(gathered, dim=1), whole)


@pytest.mark.parametrize("size", SIZES)
def test_causal_attention_is_equal_work_on_all_ranks(size):
    """A token at place i sees i + 1 tokens."""
    assert len({int((cut.places + 1).sum()) for cut in cuts_of(size)}) == 1


def test_chunks_written_out_by_hand():
    assert [cut.chunks() for cut in cuts_of(3)] == [(0, 5), (1, 4), (2, 3)]
    assert cuts_of(2, chunk_length=2)[1].places.tolist() == [2, 3, 4, 5]


def test_a_length_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(
        ValueError, match=re.escape("a sequence of 20 cannot be cut into 8 chunks, 2 for each")
    ):
        SequenceCut(20, Ranks(("cp",), None, 4, 0))


def go_round(rank, size):
    context = ParallelContext.build(Topology(size, cp_size=size), rank, torch.device("cpu"))
    own = torch.full((2, 3), 10.0 * rank)
    found = []
    for circulation in (Gather(context["cp"]), Ring(context["cp"])):
        parts = [(source, part.clone()) for source, part in circulation.parts(own)]
        # Of each part a gradient that names who gives it and whose it is.
        total = circulation.summed(own, lambda source, part: part + 100.0**source * (1 + rank))
        found.append((parts, total))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_come_to_every_rank_and_gradients_home(size):
    for rank, found in enumerate(run_distributed(go_round, size, size)):
        for parts, total in found:
            assert [source for source, _ in parts] == [(rank - hop) % size for hop in range(size)]
            assert all((part == 10.0 * source).all() for source, part in parts)
            assert (total == size * 10.0 * rank + 100.0**rank * size * (size + 1) / 2).all()
