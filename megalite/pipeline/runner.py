"""Walks one stage through a schedule: computes, keeps what backward needs, exchanges with other stages."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from megalite.batch import Batch
from megalite.pipeline.p2p import Peers
from megalite.pipeline.schedule import Action, Backward, Exchange, Forward, Transfer

Key = tuple[int, int]  # (micro batch, chunk)


class Stage(Protocol):
    """What a runner drives: forward and backward of a stage's chunks."""

    def forward(self, x: torch.Tensor | None, batch: Batch, chunk: int) -> torch.Tensor:
        """The chunk's output; x is what another stage sent, None where the chunk begins with token ids."""

    def backward(self, output: torch.Tensor, grad: torch.Tensor, chunk: int, *, is_last: bool) -> None:
        """Accumulate gradients, given that of the output."""


class PipelineRunner:
    """Runs the forwards and backwards of one optimizer step on one stage.

    With one stage and one chunk this is plain gradient accumulation.

    loss_chunk: which chunk's outputs are loss sums; None on stages without.
    """

    def __init__(self, stage: Stage, peers: Peers, *, loss_chunk: int | None) -> None:
        self.stage = stage
        self.peers = peers
        self.loss_chunk = loss_chunk

    def train(
        self, actions: Sequence[Action], micro_batches: Sequence[Batch], loss_gradient: torch.Tensor
    ) -> torch.Tensor | None:
        """Walk a training schedule; gradients accumulate in the stage.

        loss_gradient: of each loss sum, a scalar. Returns the sum of the losses where they are, else None.
        """
        return self._sum(self._run(actions, micro_batches, loss_gradient))

    @torch.no_grad()
    def evaluate(self, actions: Sequence[Action], micro_batches: Sequence[Batch]) -> torch.Tensor | None:
        """Walk a forward-only schedule; the sum of the losses where they are, else None."""
        return self._sum(self._run(actions, micro_batches, None))

    @torch.no_grad()
    def outputs(self, actions: Sequence[Action], micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Walk a forward-only schedule; what the last chunk makes of each micro batch, none where it is not.

        Of batches without labels that are logits.
        """
        return self._run(actions, micro_batches, None)

    def _sum(self, losses: list[torch.Tensor]) -> torch.Tensor | None:
        return None if self.loss_chunk is None else torch.stack(losses).sum()

    def _run(
        self, actions: Sequence[Action], micro_batches: Sequence[Batch], loss_gradient: torch.Tensor | None
    ) -> list[torch.Tensor]:
        walk = _Walk(self, micro_batches, loss_gradient)
        steps: dict[type, Callable] = {
            Forward: walk.forward,
            Backward: walk.backward,
            Exchange: walk.exchange,
        }
        for action in actions:
            steps[type(action)](action)
        self.peers.finish()
        return walk.losses


class _Walk:
    """The tensors in flight during one walk, by micro batch and chunk."""

    def __init__(
        self, runner: PipelineRunner, micro_batches: Sequence[Batch], loss_gradient: torch.Tensor | None
    ) -> None:
        self.runner = runner
        self.micro_batches = micro_batches
        self.loss_gradient = loss_gradient
        self.keep = loss_gradient is not None
        self.inputs: dict[Key, torch.Tensor] = {}
        self.outputs: dict[Key, torch.Tensor] = {}
        self.grads: dict[Key, torch.Tensor] = {}
        self.losses: list[torch.Tensor] = []

    def forward(self, action: Forward) -> None:
        key = action.micro_batch, action.chunk
        x = self.inputs.get(key) if self.keep else self.inputs.pop(key, None)
        output = self.runner.stage.forward(x, self.micro_batches[action.micro_batch], action.chunk)
        gives_loss = action.chunk == self.runner.loss_chunk
        if gives_loss:
            self.losses.append(output.detach())
        if self.keep or not gives_loss:
            self.outputs[key] = output

    def backward(self, action: Backward) -> None:
        key = action.micro_batch, action.chunk
        gives_loss = action.chunk == self.runner.loss_chunk
        grad = self.loss_gradient if gives_loss else self.grads.pop(key)
        assert grad is not None
        self.runner.stage.backward(self.outputs.pop(key), grad, action.chunk, is_last=action.is_last)

    def exchange(self, action: Exchange) -> None:
        outgoing = [self._outgoing(transfer) for transfer in action.transfers]
        tensors = self.runner.peers.exchange(action.transfers, outgoing)
        for transfer, tensor in zip(action.transfers, tensors, strict=True):
            key = transfer.micro_batch, transfer.chunk
            if transfer.verb == "receive" and transfer.kind == "activation":
                self.inputs[key] = tensor.requires_grad_(self.keep)
            elif transfer.verb == "receive":
                self.grads[key] = tensor

    def _outgoing(self, transfer: Transfer) -> torch.Tensor | None:
        key = transfer.micro_batch, transfer.chunk
        if transfer.verb == "receive":
            return None
        if transfer.kind == "activation":
            output = self.outputs[key] if self.keep else self.outputs.pop(key)
            return output.detach().contiguous()
        grad = self.inputs.pop(key).grad
        assert grad is not None
        return grad.contiguous()
