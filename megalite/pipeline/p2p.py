"""Tensors to and from the other ranks of a pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalite.parallel.context import Group


@dataclass(frozen=True)
class Arrival:
    """A tensor on its way to this rank."""

    work: dist.Work
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The tensor, once it is there."""
        self.work.wait()
        return self.tensor


@dataclass
class Peers:
    """The other ranks, as this one talks to them.

    Attributes:
        group: the ranks of one pipeline, first to last.
        shape: of every activation and its gradient.
        dtype: of every activation and its gradient.
        device: where received tensors are made.
    """

    group: Group
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    _sending: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list, init=False)

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        """Let a tensor leave, and go on. It must not be changed before `finish()`."""
        self._sending.append((self._start(dist.isend, tensor, peer), tensor))
        still = [(work, sent) for work, sent in self._sending if not work.is_completed()]
        self._sending = still

    def receive(self, peer: int) -> Arrival:
        """Expect a tensor, and go on."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return Arrival(self._start(dist.irecv, tensor, peer), tensor)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _start(self, operation: Callable, tensor: torch.Tensor, peer: int) -> dist.Work:
        """As a batch of one: NCCL then uses the group's own communicator, in the order of the calls."""
        assert self.group is not None and 0 <= peer < self.group.size()
        whom = dist.get_global_rank(self.group, peer)
        (work,) = dist.batch_isend_irecv([dist.P2POp(operation, tensor, whom, group=self.group)])
        return work
