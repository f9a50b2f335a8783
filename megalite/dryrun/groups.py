"""The groups of a job: each rank makes its own, as it would, without a process."""

from dataclasses import dataclass
from typing import Any

import torch

from megalite.config.run import RunConfig
from megalite.dryrun.log import TIED, WORLD, Members
from megalite.dryrun.recorder import named_groups
from megalite.dryrun.roster import Order, Roster
from megalite.parallel.context import Group, ParallelContext
from megalite.training.layout import topology_of


@dataclass(frozen=True)
class ListedGroup:
    """A process group of which only the members are known."""

    members: Members


def build_roster(run: RunConfig, world_size: int) -> Roster:
    """The groups of every rank, as its ParallelContext makes them."""
    topology, device = topology_of(run, world_size), torch.device("meta")
    known: dict[Members, Any] = {}  # one object for each group, whoever lists it
    orders: dict[Order, Order] = {}
    world = tuple(range(world_size))
    roster = Roster([], [], [])
    for rank in range(world_size):
        made: list[Members] = []

        def list_group(ranks: list[int], made: list[Members] = made) -> Group:
            members = tuple(ranks)
            if members not in known:
                known[members] = ListedGroup(members)
            made.append(known[members].members)
            return known[members]

        context = ParallelContext.build(topology, rank, device, list_group)
        named: dict[str, Any] = named_groups(context, TIED)
        members = {WORLD: world}
        for name, group in named.items():
            if group.members not in members.values():  # of several names the first, as in a Recorder
                members[name] = group.members
        roster.groups.append(members)
        order = tuple(made)
        roster.orders.append(orders.setdefault(order, order))
        roster.pp_ranks.append(context["pp"].rank)
    return roster
