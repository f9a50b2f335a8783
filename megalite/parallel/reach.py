"""How the ranks of a group on one node reach each other's memory: by process and descriptor, in /proc."""

import mmap
import os
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.parallel.slots import SLOT_BYTES, SLOTS

LARGEST_GROUP = 32  # a rank has three descriptors for each of the others, of some thousand in all


@dataclass(frozen=True)
class Reach:
    """What a rank has opened.

    slots: of all ranks, each uint8 [SLOTS, SLOT_BYTES].
    from_rank, to_rank: descriptors of the pipes from and to each of the others, by its rank.
    """

    slots: list[torch.Tensor]
    from_rank: dict[int, int]
    to_rank: dict[int, int]


@dataclass(frozen=True)
class _Offer:
    """What a rank has for the others to open: descriptors of its process, and the name of its memory.

    ends: by rank, where that one writes to this one.
    """

    process: int
    name: str
    memory: int
    ends: dict[int, int]


def reach(group: dist.ProcessGroup) -> Reach | None:
    """Open what all ranks of a group have for each other; collective.

    None, on all ranks, where one of them cannot: on another node or in another container, of another user, on
    a system that has no such memory, or where descriptors have run out.
    """
    rank, size = group.rank(), group.size()
    kernels = _gather(_kernel(), group) if size <= LARGEST_GROUP else [None]
    if None in kernels or len(set(kernels)) > 1:
        return None
    with ExitStack() as offered, ExitStack() as kept:
        try:
            offer, from_rank = _offer(rank, size, offered, kept)
        except OSError:
            offer, from_rank = None, {}
        offers = _gather(offer, group)
        try:
            slots, to_rank = _opened(rank, offers, kept)
        except OSError:
            slots, to_rank = [], {}
        if all(_gather(bool(slots), group)):  # by now all have opened what they will
            kept.pop_all()
            return Reach(slots, from_rank, to_rank)
    return None


def _kernel() -> tuple[str, ...] | None:
    """What processes that may know each other by number have in common; None where they may not."""
    try:
        boot, numbers = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return (boot, numbers) if hasattr(os, "memfd_create") else None


def _offer(rank: int, size: int, offered: ExitStack, kept: ExitStack) -> tuple[_Offer, dict[int, int]]:
    """Memory of this process, all zeros and none of it taken yet, and a pipe from each of the others."""
    from_rank, ends = {}, {}
    for other in range(size):
        if other != rank:
            from_rank[other], ends[other] = os.pipe()
            kept.callback(os.close, from_rank[other])
            offered.callback(os.close, ends[other])
    name = f"megalite-{secrets.token_hex(8)}"
    memory = os.memfd_create(name)
    offered.callback(os.close, memory)
    os.truncate(memory, SLOTS * SLOT_BYTES)
    return _Offer(os.getpid(), name, memory, ends), from_rank


def _opened(
    rank: int, offers: list[_Offer | None], kept: ExitStack
) -> tuple[list[torch.Tensor], dict[int, int]]:
    """The slots of all ranks, and the pipes to the others. OSError where one of them is out of reach."""
    slots: list[torch.Tensor] = []
    to_rank: dict[int, int] = {}
    for other, offer in enumerate(offers):
        if offer is None:
            raise OSError(f"rank {other} has nothing to open")
        descriptors = Path(f"/proc/{offer.process}/fd")
        if offer.name not in os.readlink(descriptors / str(offer.memory)):
            raise OSError(f"process {offer.process} is not rank {other}")
        with open(descriptors / str(offer.memory), "r+b", buffering=0) as file:
            room = mmap.mmap(file.fileno(), SLOTS * SLOT_BYTES)
        slots.append(torch.frombuffer(room, dtype=torch.uint8).view(SLOTS, SLOT_BYTES))
        if other != rank:
            to_rank[other] = os.open(descriptors / str(offer.ends[rank]), os.O_WRONLY)
            kept.callback(os.close, to_rank[other])
    return slots, to_rank


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
