"""A world of one process that takes itself for one rank of many: what it would say is written down."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megalite.dryrun.log import WORLD, Call, Entry, Exchange, Log, Members, Passage, Verb
from megalite.parallel.context import GROUPS, Group, ParallelContext

BACKEND = "recorded"


class Done(dist.Work):
    """Communication that takes no time."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Recorder:
    """The log of one rank.

    Attributes:
        names: of groups, by their members.
        place: what the rank is doing, in words.
        tensor: what the next passage of a pipeline carries, in words.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.names: dict[Members, str] = {}
        self.place = "before the step"
        self.tensor = ""
        self._entries: list[Entry] = []
        self._batch: list[Passage] | None = None

    @property
    def log(self) -> Log:
        """What was said so far."""
        return tuple(self._entries)

    def call(self, group: str, kind: str, num_bytes: int, *, is_modelled: bool = False) -> None:
        """Write a collective down."""
        self._entries.append(Call(group, kind, num_bytes, self.place, is_modelled))

    def passage(self, verb: Verb, members: Members, peer: int, tensor: torch.Tensor) -> None:
        """Write a tensor down that goes to, or comes from, a place in a group."""
        name = self.names[members]
        offset = (peer - members.index(self.rank)) % len(members)
        passage = Passage(verb, name, offset, tensor.nbytes, self.tensor or f"part over {name}")
        if self._batch is None:
            self._entries.append(Exchange((passage,), self.place))
        else:
            self._batch.append(passage)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """What is passed within goes at once."""
        self._batch = []
        try:
            yield
            self._entries.append(Exchange(tuple(self._batch), self.place))
        finally:
            self._batch = None

    def name_groups(self, context: ParallelContext, tied: str) -> None:
        """Learn the names of a context's groups; of those with the same members the first one's."""
        for name, group in named_groups(context, tied).items():
            self.names.setdefault(group.members, name)


def named_groups(context: ParallelContext, tied: str) -> dict[str, Any]:
    """The groups of a rank by the axes that they run along, and the one of the ends of its pipeline."""
    named: dict[str, Group] = {" x ".join(axes): context[axes].group for axes in GROUPS}
    return {name: group for name, group in (named | {tied: context.tied_group}).items() if group is not None}


class RecordedGroup(dist.ProcessGroup):
    """A process group that says nothing, and tells a recorder what it would have said."""

    def __init__(self, recorder: Recorder, members: Members) -> None:
        super().__init__(members.index(recorder.rank), len(members))  # type: ignore[call-arg]
        self.recorder, self.members = recorder, members

    def new_group(self, ranks: list[int], **options: Any) -> "RecordedGroup | None":
        """Called by torch on the world's group, in place of its own making of a group."""
        return RecordedGroup(self.recorder, tuple(ranks)) if self.recorder.rank in ranks else None

    def _call(self, kind: str, *tensors: torch.Tensor) -> Done:
        name = self.recorder.names[self.members]
        self.recorder.call(name, kind, sum(tensor.nbytes for tensor in tensors))
        return Done()

    def allreduce(self, tensors: Any, *options: Any) -> Done:
        return self._call("all_reduce", *tensors)

    def all_gather_single(self, output: torch.Tensor, *rest: Any) -> Done:
        return self._call("all_gather", output)

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, *options: Any) -> Done:
        return self._call("reduce_scatter", whole)

    def all_to_all_single(self, output: torch.Tensor, whole: torch.Tensor, *rest: Any) -> Done:
        return self._call("all_to_all", whole)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Done:
        self.recorder.passage("send", self.members, peer, tensors[0])
        return Done()

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Done:
        self.recorder.passage("receive", self.members, peer, tensors[0])
        return Done()

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        return BACKEND


@contextmanager
def recorded_world(rank: int, world_size: int) -> Iterator[Recorder]:
    """torch.distributed as a rank of a world sees it, whose other ranks are not there."""
    recorder = Recorder(rank)
    world = tuple(range(world_size))
    pass_all, hook = dist.batch_isend_irecv, sys.excepthook
    dist.Backend.register_backend(BACKEND, _create_world, extended_api=True, devices=["meta"])
    dist.init_process_group(
        BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size, pg_options=recorder
    )
    recorder.names[world] = WORLD

    def pass_at_once(operations: list[dist.P2POp]) -> list[dist.Work]:
        with recorder.batch():
            return pass_all(operations)

    try:
        with patch.object(dist, "batch_isend_irecv", pass_at_once):
            yield recorder
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch's own would mark all later errors as this rank's


def _create_world(options: Any, recorder: Recorder) -> RecordedGroup:
    return RecordedGroup(recorder, tuple(range(options.group_size)))
