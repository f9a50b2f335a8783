"""Tensors to and from the other stages of a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalite.parallel.context import Group
from megalite.pipeline.schedule import Transfer


@dataclass
class Peers:
    """The other stages, as this rank talks to them.

    Attributes:
        group: the stages of one pipeline, first to last.
        shape: of every activation and its gradient.
        dtype: of every activation and its gradient.
        device: where received tensors are made.
    """

    group: Group
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    _sending: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list, init=False)

    def exchange(
        self, transfers: Sequence[Transfer], outgoing: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Post all transfers as one batch and wait for what comes.

        outgoing: the tensor of each "send", None for each "receive". Returns the tensor of each transfer.
        What is sent must not be changed before `finish()`.
        """
        tensors = [self._buffer() if tensor is None else tensor for tensor in outgoing]
        self._start(
            [
                dist.P2POp(
                    dist.isend if transfer.verb == "send" else dist.irecv,
                    tensor,
                    self._global_rank(transfer.peer),
                    group=self.group,
                )
                for transfer, tensor in zip(transfers, tensors, strict=True)
            ]
        )
        return tensors

    def _start(self, operations: list[dist.P2POp]) -> None:
        works = dist.batch_isend_irecv(operations)
        for operation, work in zip(operations, works, strict=False):
            # Gloo has a work per operation; NCCL one for the whole batch, whose wait only orders streams.
            if operation.op is dist.isend and len(works) == len(operations):
                self._sending.append((work, operation.tensor))
            else:
                work.wait()
        self._sending = [(work, tensor) for work, tensor in self._sending if not work.is_completed()]

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _buffer(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def _global_rank(self, stage: int) -> int:
        assert self.group is not None and 0 <= stage < self.group.size()
        return dist.get_global_rank(self.group, stage)
