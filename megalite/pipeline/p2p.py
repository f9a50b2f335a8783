"""Tensors to and from the neighbouring stages of a pipeline."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalite.parallel.context import Group, group_rank, group_size


@dataclass
class Neighbours:
    """The previous and the next stage, as this rank talks to them.

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
        self,
        *,
        to_next: torch.Tensor | None = None,
        to_previous: torch.Tensor | None = None,
        from_previous: bool = False,
        from_next: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Post all as one batch, wait for what comes: (from previous, from next).

        What is sent must not be changed before `finish()`.
        """
        received_previous = self._buffer() if from_previous else None
        received_next = self._buffer() if from_next else None
        transfers = [
            (dist.isend, to_next, 1),
            (dist.irecv, received_next, 1),
            (dist.isend, to_previous, -1),
            (dist.irecv, received_previous, -1),
        ]
        operations = [
            dist.P2POp(verb, tensor, self._rank_at(step), group=self.group)
            for verb, tensor, step in transfers
            if tensor is not None
        ]
        self._start(operations)
        return received_previous, received_next

    def _start(self, operations: list[dist.P2POp]) -> None:
        works = dist.batch_isend_irecv(operations)
        for operation, work in zip(operations, works, strict=False):
            # Gloo has a work an operation; NCCL one for the whole batch, whose wait only orders streams.
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

    def _rank_at(self, step: int) -> int:
        assert self.group is not None and 0 <= group_rank(self.group) + step < group_size(self.group)
        return dist.get_global_rank(self.group, group_rank(self.group) + step)
