"""Walks one stage through a schedule: computes, keeps what backward needs, exchanges with neighbours."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from megalite.pipeline.p2p import Neighbours
from megalite.pipeline.schedule import Action, Backward, Exchange, Forward


class MicroBatch(NamedTuple):
    """What one forward takes in, each [b, s]; every stage is given the same."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None = None


class Stage(Protocol):
    """What a runner drives: one stage's forward and backward."""

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """The stage's output; on the last stage, which is given labels, the loss."""

    def backward(self, output: torch.Tensor, grad: torch.Tensor | None, *, is_last: bool) -> None:
        """Accumulate gradients; grad is None where the output is the loss."""


class PipelineRunner:
    """Runs the forwards and backwards of one optimizer step on one stage.

    The first stage reads token ids, the last computes the loss; with one stage this is plain gradient
    accumulation.
    """

    def __init__(self, stage: Stage, neighbours: Neighbours, *, is_first: bool, is_last: bool) -> None:
        self.stage = stage
        self.neighbours = neighbours
        self.is_first = is_first
        self.is_last = is_last

    def train(self, actions: Sequence[Action], micro_batches: Sequence[MicroBatch]) -> torch.Tensor | None:
        """Walk a training schedule; gradients accumulate in the stage.

        Returns the mean loss over the micro batches on the last stage, else None.
        """
        return self._run(actions, micro_batches, keep=True)

    @torch.no_grad()
    def evaluate(self, actions: Sequence[Action], micro_batches: Sequence[MicroBatch]) -> torch.Tensor | None:
        """Walk a forward-only schedule; the mean loss on the last stage, else None."""
        return self._run(actions, micro_batches, keep=False)

    def _run(
        self, actions: Sequence[Action], micro_batches: Sequence[MicroBatch], *, keep: bool
    ) -> torch.Tensor | None:
        walk = _Walk(self, micro_batches, keep)
        steps: dict[type, Callable] = {
            Forward: walk.forward,
            Backward: walk.backward,
            Exchange: walk.exchange,
        }
        for action in actions:
            steps[type(action)](action)
        self.neighbours.finish()
        return torch.stack(walk.losses).mean() if self.is_last else None


class _Walk:
    """The tensors in flight during one walk, by micro batch."""

    def __init__(self, runner: PipelineRunner, micro_batches: Sequence[MicroBatch], keep: bool) -> None:
        self.runner = runner
        self.micro_batches = micro_batches
        self.keep = keep
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.grads: dict[int, torch.Tensor] = {}
        self.losses: list[torch.Tensor] = []

    def forward(self, action: Forward) -> None:
        number, runner = action.micro_batch, self.runner
        batch = self.micro_batches[number]
        x = batch.input_ids if runner.is_first else self.inputs[number]
        output = runner.stage.forward(x, batch.labels if runner.is_last else None, batch.document_starts)
        self.outputs[number] = output
        if runner.is_last:
            self.losses.append(output.detach())
        if not self.keep:
            self.inputs.pop(number, None)

    def backward(self, action: Backward) -> None:
        number = action.micro_batch
        is_last = number == len(self.micro_batches) - 1  # schedules run backwards in order
        self.runner.stage.backward(self.outputs.pop(number), self.grads.pop(number, None), is_last=is_last)

    def exchange(self, action: Exchange) -> None:
        from_previous, from_next = self.runner.neighbours.exchange(
            to_next=self._outgoing(action.send_forward),
            to_previous=self._input_gradient(action.send_backward),
            from_previous=action.recv_forward is not None,
            from_next=action.recv_backward is not None,
        )
        if from_previous is not None and action.recv_forward is not None:
            self.inputs[action.recv_forward] = from_previous.requires_grad_(self.keep)
        if from_next is not None and action.recv_backward is not None:
            self.grads[action.recv_backward] = from_next

    def _outgoing(self, number: int | None) -> torch.Tensor | None:
        if number is None:
            return None
        output = self.outputs[number] if self.keep else self.outputs.pop(number)
        return output.detach().contiguous()

    def _input_gradient(self, number: int | None) -> torch.Tensor | None:
        if number is None:
            return None
        grad = self.inputs.pop(number).grad
        assert grad is not None
        return grad.contiguous()
