"""Slices of all layouts make the whole again, on one rank or on all, and are cut of it again."""

from math import prod

import pytest
import torch

from megalite.parallel.assembly import Assembly, Part, balance, units_of
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import cut_spec
from megalite.parallel.topology import STAGE_AXES, Topology
from tests.harness import run_distributed

DEVICE = torch.device("cpu")
# a matrix cut by rows, one by columns, one with copies on neighbours, a stack over ep
SHAPES = {"rows": (8, 6), "columns": (6, 8), "copies": (6, 5), "stack": (4, 3, 8)}


def spec_in(context, name):
    shape = SHAPES[name]
    if name == "copies":
        return cut_spec(context, name, shape, 0, over="kv")
    dim = {"rows": 0, "columns": 1, "stack": 2}[name]
    spec = cut_spec(context, name, shape, dim)
    return spec.over_experts(context) if name == "stack" else spec


def whole_of(name):
    return torch.arange(prod(SHAPES[name]), dtype=torch.float32).view(SHAPES[name]) + 1


def ranges(numel, data, zero):
    """What ZeRO leaves this rank: all of it, an equal range with padding behind, or an uneven one."""
    if zero == 0:
        return 0, numel
    if zero == 3:
        each = -(-numel // data.size)
        start = min(data.rank * each, numel)
        return start, min(each, numel - start)
    bounds = [0, *(numel // 3 + i for i in range(data.size - 1)), numel]  # some ranks hold next to nothing
    return bounds[data.rank], bounds[data.rank + 1] - bounds[data.rank]


def parts_of(context, zero, names):
    parts, slices = [], []
    for name in names:
        spec = spec_in(context, name)
        flat = spec.cut(whole_of(name)).flatten()
        start, numel = ranges(flat.numel(), context[spec.averaged_over], zero)
        parts.append(Part(spec, start, numel))
        slices.append(flat[start : start + numel])
    return parts, slices


def double_and_turn(unit):
    """Not element by element: each becomes the sum of its row, plus itself twice."""
    return 2 * unit + unit.sum(dim=2, keepdim=True)


def check_exchange(rank, sizes, zero, exchange):
    topology = Topology(4, **sizes)
    context = ParallelContext.build(topology, rank, DEVICE)
    names = list(SHAPES) if zero == 3 or sizes.get("ep_size", 1) == 1 else list(SHAPES)[:3]
    parts, slices = parts_of(context, zero, names)
    assembly = Assembly(parts, context[STAGE_AXES], DEVICE, exchange)
    changed = assembly.apply(slices, double_and_turn)
    for name, part, got in zip(names, parts, changed, strict=True):
        whole = whole_of(name)
        expected = double_and_turn(whole.view(-1, *whole.shape[-2:])).view(whole.shape)
        local = part.spec.cut(expected).flatten()
        assert got.equal(local[part.start : part.start + part.numel]), name
    loads = [sum(unit.cost for unit in units) for units in assembly.units_of_owner]
    return loads


LAYOUTS = [
    {"tp_size": 2, "kv_copy_size": 2},
    {"tp_size": 4, "kv_copy_size": 2},
    {"tp_size": 2, "ep_size": 2},
    {"ep_size": 2},
    {"pp_size": 2, "tp_size": 2},
]


def check_layouts(rank):
    loads = []
    for sizes in LAYOUTS:
        for zero in (0, 1, 3):
            for exchange in ("owner", "gather"):
                if sizes.get("ep_size", 1) == 1 or zero == 3:
                    loads.append(check_exchange(rank, sizes, zero, exchange))
    return loads


def test_every_rank_gets_its_slices_of_what_the_whole_became():
    by_rank = run_distributed(check_layouts, 4)
    assert all(max(loads) < sum(loads) for loads in by_rank[0])


def test_ranks_that_do_not_hold_all_are_noticed():
    parts, _ = parts_of(ParallelContext(), 0, ["rows"])
    table = [[[0, 47, 0, 0, 0]]]
    with pytest.raises(ValueError, match="rows: the ranks of a stage hold 47 of 48 elements"):
        units_of(parts, table)


def test_loads_are_balanced_by_cost():
    assert balance([2, 9, 5, 3], 2) == [1, 0, 1, 1]
    assert balance([3, 3, 3], 5) == [0, 1, 2]
    costs = [7 * i % 31 + 1 for i in range(200)]
    owners = balance(costs, 8)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(8)]
    assert max(loads) - min(loads) <= max(costs)
