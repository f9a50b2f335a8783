"""Walks one rank through a schedule: computes, keeps what backward needs, exchanges with other ranks."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from megalite.batch import Batch
from megalite.pipeline.actions import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Handover,
    Kind,
    Transfer,
)
from megalite.pipeline.p2p import Arrival, Peers
from megalite.pipeline.recording import Record, not_recorded

Key = tuple[int, int]  # (micro batch, chunk)


class Stage(Protocol):
    """What a runner drives: forward and backward of a rank's chunks."""

    def forward(self, x: torch.Tensor | None, batch: Batch, chunk: int) -> torch.Tensor:
        """The chunk's output; x is what another stage sent, None where the chunk begins with token ids."""

    def backward(self, output: torch.Tensor, grad: torch.Tensor, chunk: int, *, is_last: bool) -> None:
        """Accumulate gradients, given that of the output."""

    def backward_input(self, output: torch.Tensor, grad: torch.Tensor, chunk: int) -> Any:
        """The gradient of the input; what is left to do for the weights is returned, and comes back below."""

    def backward_weight(self, left: Any, *, is_last: bool) -> None:
        """Accumulate the gradients of weights that a backward_input left."""


class PipelineRunner:
    """Runs the forwards and backwards of one optimizer step on one rank.

    With one rank and one chunk this is plain gradient accumulation.

    loss_chunk: which chunk's outputs are loss sums; None on ranks without.
    """

    def __init__(self, stage: Stage, peers: Peers, *, loss_chunk: int | None) -> None:
        self.stage = stage
        self.peers = peers
        self.loss_chunk = loss_chunk

    def train(
        self,
        actions: Sequence[Action],
        micro_batches: Sequence[Batch],
        loss_gradient: torch.Tensor,
        record: Record = not_recorded,
    ) -> torch.Tensor | None:
        """Walk a training schedule; gradients accumulate in the stage.

        loss_gradient: of each loss sum, a scalar. record: entered around all that is done. Returns the sum of
        the losses where they are, else None.
        """
        return self._sum(self._run(actions, micro_batches, loss_gradient, record))

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
        self,
        actions: Sequence[Action],
        micro_batches: Sequence[Batch],
        loss_gradient: torch.Tensor | None,
        record: Record = not_recorded,
    ) -> list[torch.Tensor]:
        walk = _Walk(self, micro_batches, loss_gradient, record)
        steps: dict[type, Callable] = {
            Forward: walk.forward,
            Backward: walk.backward,
            BackwardInput: walk.backward_input,
            BackwardWeight: walk.backward_weight,
            Transfer: walk.transfer,
            Handover: walk.hand_over,
        }
        for action in actions:
            steps[type(action)](action)
        with record("wait", None):
            self.peers.finish()
        return walk.losses


class _Walk:
    """The tensors in flight during one walk, by micro batch and chunk."""

    def __init__(
        self,
        runner: PipelineRunner,
        micro_batches: Sequence[Batch],
        loss_gradient: torch.Tensor | None,
        record: Record,
    ) -> None:
        self.runner = runner
        self.record = record
        self.micro_batches = micro_batches
        self.loss_gradient = loss_gradient
        self.keep = loss_gradient is not None
        self.inputs: dict[Key, torch.Tensor | Arrival] = {}
        self.outputs: dict[Key, torch.Tensor] = {}
        self.grads: dict[Key, torch.Tensor | Arrival] = {}
        self.left: dict[Key, Any] = {}  # of backwards whose weights are yet to come
        self.losses: list[torch.Tensor] = []

    def forward(self, action: Forward) -> None:
        key = action.micro_batch, action.chunk
        x = self._arrived(self.inputs.pop(key, None), action)
        if x is not None and self.keep:
            self.inputs[key] = x.requires_grad_()
        with self.record("compute", action):
            output = self.runner.stage.forward(x, self.micro_batches[action.micro_batch], action.chunk)
        gives_loss = action.chunk == self.runner.loss_chunk
        if gives_loss:
            self.losses.append(output.detach())
        if self.keep or not gives_loss:
            self.outputs[key] = output

    def backward(self, action: Backward) -> None:
        output, grad = self._to_backward(action)
        with self.record("compute", action):
            self.runner.stage.backward(output, grad, action.chunk, is_last=action.is_last)

    def backward_input(self, action: BackwardInput) -> None:
        output, grad = self._to_backward(action)
        with self.record("compute", action):
            left = self.runner.stage.backward_input(output, grad, action.chunk)
        self.left[action.micro_batch, action.chunk] = left

    def backward_weight(self, action: BackwardWeight) -> None:
        left = self.left.pop((action.micro_batch, action.chunk))
        with self.record("compute", action):
            self.runner.stage.backward_weight(left, is_last=action.is_last)

    def _to_backward(self, action: Backward | BackwardInput) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's output and its gradient."""
        key = action.micro_batch, action.chunk
        gives_loss = action.chunk == self.runner.loss_chunk
        grad = self.loss_gradient if gives_loss else self._arrived(self.grads.pop(key), action)
        assert grad is not None
        return self.outputs.pop(key), grad

    def transfer(self, action: Transfer) -> None:
        key = action.micro_batch, action.chunk
        with self.record("post", action):
            if action.verb == "send":
                self.runner.peers.send(self._outgoing(action.kind, key).contiguous(), action.peer)
            else:
                self._incoming(action.kind)[key] = self.runner.peers.receive(action.peer)

    def hand_over(self, action: Handover) -> None:
        tensor = self._outgoing(action.kind, (action.micro_batch, action.source))
        self._incoming(action.kind)[action.micro_batch, action.target] = tensor

    def _arrived(self, tensor: torch.Tensor | Arrival | None, action: Compute) -> torch.Tensor | None:
        """What an action needs, once it is there."""
        if not isinstance(tensor, Arrival):
            return tensor
        with self.record("wait", action):
            return tensor.wait()

    def _incoming(self, kind: Kind) -> dict[Key, torch.Tensor | Arrival]:
        return self.inputs if kind == "activation" else self.grads

    def _outgoing(self, kind: Kind, key: Key) -> torch.Tensor:
        if kind == "activation":
            output = self.outputs[key] if self.keep else self.outputs.pop(key)
            return output.detach()
        grad = self.inputs.pop(key).grad  # type: ignore[union-attr]
        assert grad is not None
        return grad
