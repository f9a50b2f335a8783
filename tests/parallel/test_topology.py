"""The grid of ranks, for every small world and some large ones."""

from math import prod

import pytest

from megalite.parallel.topology import AXES, CUTS, Topology

SIZES = [
    {"tp_size": tp, "cp_size": cp, "pp_size": pp, "dp": dp}
    for tp in (1, 2, 3, 4)
    for cp in (1, 2)
    for pp in (1, 2, 3)
    for dp in (1, 2, 5)
]
WORLDS = [(prod(sizes.values()), {k: v for k, v in sizes.items() if k != "dp"}) for sizes in SIZES]
GROUPS = [
    ("tp",),
    ("cp",),
    ("dp",),
    ("pp",),
    ("dp", "cp"),
    ("pp", "tp"),
    ("kv_copy",),
    ("kv",),
    ("ep",),
    ("edp",),
]


@pytest.mark.parametrize(("world_size", "sizes"), WORLDS)
@pytest.mark.parametrize("axes", GROUPS, ids="x".join)
def test_every_kind_of_group_partitions_the_world(world_size, sizes, axes):
    topology = Topology(world_size, **sizes, kv_copy_size=sizes["tp_size"])
    groups = topology.groups(*axes)
    assert all(len(group) == prod(topology[axis].size for axis in axes) for group in groups)
    assert sorted(rank for group in groups for rank in group) == list(range(world_size))
    for group in groups:
        assert all(topology.members(rank, *axes) == group for rank in group)


@pytest.mark.parametrize(("world_size", "sizes"), WORLDS)
def test_a_rank_is_its_place_along_the_axes_as_the_formula_says(world_size, sizes):
    topology = Topology(world_size, **sizes)
    dp, cp, tp = (topology[axis].size for axis in ("dp", "cp", "tp"))
    for rank in range(world_size):
        pp_rank, dp_rank, cp_rank, tp_rank = (topology.place(rank, axis) for axis in AXES)
        assert rank == ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank
        for axis in AXES:
            others = [other for other in AXES if other != axis]
            group = topology.members(rank, axis)
            assert [topology.place(member, axis) for member in group] == list(range(topology[axis].size))
            for other in others:
                assert len({topology.place(member, other) for member in group}) == 1


def test_tensor_parallel_neighbours_are_consecutive_ranks():
    topology = Topology(1024, tp_size=8, pp_size=4)
    assert topology["dp"].size == 32
    assert all(group == list(range(group[0], group[0] + 8)) for group in topology.groups("tp"))
    assert topology.groups("pp")[0] == [0, 256, 512, 768]


def test_groups_written_out_by_hand():
    topology = Topology(8, tp_size=4, kv_copy_size=2)
    assert topology.groups("kv_copy") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups("kv") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    topology = Topology(16, pp_size=2, cp_size=2, ep_size=4)  # dp 4 x cp 2 per stage
    assert topology.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert topology.groups("edp")[:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups("pp", "tp")[:2] == [[0, 8], [1, 9]]


@pytest.mark.parametrize("ep_size", [1, 2, 3, 4, 6, 12])
def test_a_cut_and_its_rest_are_the_axes_that_it_is_cut_from(ep_size):
    topology = Topology(24, tp_size=2, cp_size=2, ep_size=ep_size)
    within, rest = CUTS["ep"]
    assert topology.groups(rest, "ep") == topology.groups(*within)


def test_a_world_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"6 processes .* tp_size 2 x pp_size 2 = 4"):
        Topology(6, tp_size=2, pp_size=2)
    with pytest.raises(ValueError, match=r"6 ranks of dp x cp cannot be cut into runs of ep_size 4"):
        Topology(12, tp_size=2, ep_size=4)
    with pytest.raises(TypeError, match="up_size: no such axis; known are pp, dp, cp, tp, ep, kv_copy"):
        Topology(2, up_size=2)
