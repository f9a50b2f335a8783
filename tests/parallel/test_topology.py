"""The grid of ranks, for every small world and some large ones."""

import pytest

from megalite.parallel.topology import Topology

WORLDS = [(tp * pp * dp, tp, pp) for tp in (1, 2, 3, 4, 8) for pp in (1, 2, 3, 8) for dp in (1, 2, 5, 16)]


@pytest.mark.parametrize(("world_size", "tp_size", "pp_size"), WORLDS)
def test_every_kind_of_group_partitions_the_world(world_size, tp_size, pp_size):
    topology = Topology(world_size, tp_size, pp_size)
    kinds = [
        (topology.tp_groups(), tp_size),
        (topology.pp_groups(), pp_size),
        (topology.dp_groups(), topology.dp_size),
        (topology.model_parallel_groups(), tp_size * pp_size),
        (topology.replica_groups(tp_size), tp_size),
        (topology.replica_groups(1), 1),
    ]
    for groups, size in kinds:
        assert all(len(group) == size for group in groups)
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))


@pytest.mark.parametrize(("world_size", "tp_size", "pp_size"), WORLDS)
def test_groups_hold_one_axis_and_ranks_round_trip(world_size, tp_size, pp_size):
    topology = Topology(world_size, tp_size, pp_size)
    places = [topology.coordinates(rank) for rank in range(world_size)]
    for rank, place in enumerate(places):
        assert topology.rank_at(place.pp_rank, place.dp_rank, place.tp_rank) == rank
    for group in topology.tp_groups():
        assert [places[rank].tp_rank for rank in group] == list(range(tp_size))
        assert len({(places[rank].pp_rank, places[rank].dp_rank) for rank in group}) == 1
    for group in topology.dp_groups():
        assert len({(places[rank].pp_rank, places[rank].tp_rank) for rank in group}) == 1
    for group in topology.model_parallel_groups():
        order = [places[rank].pp_rank * tp_size + places[rank].tp_rank for rank in group]
        assert order == list(range(tp_size * pp_size))


def test_tensor_parallel_neighbours_are_consecutive_ranks():
    topology = Topology(1024, tp_size=8, pp_size=4)
    assert topology.dp_size == 32
    assert all(group == list(range(group[0], group[0] + 8)) for group in topology.tp_groups())
    assert topology.pp_groups()[0] == [0, 256, 512, 768]
    assert topology.tied_groups()[0] == [0, 768]


def test_a_world_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"6 processes .* tp_size 2 x pp_size 2 = 4"):
        Topology(6, tp_size=2, pp_size=2)
