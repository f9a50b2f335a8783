"""Bytes that leave each rank in a step, within its node and to others.

A collective goes round its members in a ring: of n ranks each sends (n - 1)/n of the tensor to the next,
twice in an all-reduce. In an all-to-all each sends 1/n to every other. A network library may do otherwise.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megalite.dryrun.log import Call, Log, Members
from megalite.dryrun.roster import Roster

RING_TURNS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass
class Traffic:
    """What is said over one kind of group.

    Attributes:
        num_members: of each group.
        num_entries: the most that one rank enters.
        in_node_bytes: by rank, that leave it for others of its node.
        between_nodes_bytes: by rank, that leave it for other nodes.
    """

    num_members: int
    num_entries: int = 0
    in_node_bytes: Counter[int] = field(default_factory=Counter)
    between_nodes_bytes: Counter[int] = field(default_factory=Counter)


@dataclass
class _Sent:
    """What one log says over one group: bytes in rings, to all, and to single ranks by offset."""

    num_entries: int = 0
    ring_bytes: int = 0
    to_all_bytes: int = 0
    to_offset_bytes: Counter[int] = field(default_factory=Counter)


def traffic_of(logs: Sequence[Log], roster: Roster, gpus_per_node: int) -> dict[str, Traffic]:
    """By the name of the group."""
    sent = {id(log): _sent(log) for log in {id(log): log for log in logs}.values()}
    traffic: dict[str, Traffic] = {}
    for rank, log in enumerate(logs):
        for name, own in sent[id(log)].items():
            members = roster.groups[rank][name]
            of_name = traffic.setdefault(name, Traffic(len(members)))
            of_name.num_entries = max(of_name.num_entries, own.num_entries)
            for peer, num_bytes in _by_peer(rank, members, own).items():
                is_near = peer // gpus_per_node == rank // gpus_per_node
                (of_name.in_node_bytes if is_near else of_name.between_nodes_bytes)[rank] += num_bytes
    return traffic


def _by_peer(rank: int, members: Members, sent: _Sent) -> Counter[int]:
    place, size = members.index(rank), len(members)
    by_peer: Counter[int] = Counter()
    if sent.ring_bytes:
        by_peer[members[(place + 1) % size]] += sent.ring_bytes * (size - 1) // size
    for peer in members if sent.to_all_bytes else ():
        if peer != rank:
            by_peer[peer] += sent.to_all_bytes // size
    for offset, num_bytes in sent.to_offset_bytes.items():
        by_peer[members[(place + offset) % size]] += num_bytes
    return by_peer


def _sent(log: Log) -> dict[str, _Sent]:
    by_group: dict[str, _Sent] = {}
    for entry in log:
        if isinstance(entry, Call):
            sent = by_group.setdefault(entry.group, _Sent())
            sent.num_entries += 1
            if entry.kind in RING_TURNS:
                sent.ring_bytes += RING_TURNS[entry.kind] * entry.num_bytes
            else:
                sent.to_all_bytes += entry.num_bytes
            continue
        for passage in entry.passages:
            sent = by_group.setdefault(passage.group, _Sent())
            sent.num_entries += 1
            if passage.verb == "send":
                sent.to_offset_bytes[passage.offset] += passage.num_bytes
    return by_group
