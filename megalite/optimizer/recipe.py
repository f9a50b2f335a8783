"""What an optimizer is to the rest: its groups of parameters, their rates, and the state that it keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import nn

from megalite.optimizer.slices import MasterSlice
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import ShardSpec

RATE_FACTOR = "learning_rate_factor"  # key in a torch optimizer's parameter group


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are stepped alike.

    learning_rate_factor: their rate, as a multiple of the run's at that step.
    settings: further ones of the torch optimizer.
    """

    parameters: list[nn.Parameter]
    learning_rate_factor: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)

    def for_torch(self) -> dict[str, Any]:
        """As a torch optimizer takes it."""
        return {"params": self.parameters, RATE_FACTOR: self.learning_rate_factor, **self.settings}


class Recipe(Protocol):
    """An optimizer by its parts; checkpoints, memory counts and the engine read what they need of it."""

    def kinds_of(self, name: str, full_shape: Sequence[int]) -> tuple[str, ...]:
        """Names of the tensors that it keeps for a parameter, each of the parameter's shape and in fp32."""

    def groups(self, parameters: Sequence[nn.Parameter]) -> list[ParameterGroup]:
        """The parameters to train, each in one group.

        Every stage of a pipeline must have equally many groups: DeepSpeed reduces the gradient norm once per
        group over all stages, and a stage with fewer would leave the others waiting.
        """

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """The torch optimizer."""

    def settle(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Mapping[nn.Parameter, MasterSlice],
        context: ParallelContext,
    ) -> None:
        """Called once, by all ranks, when ZeRO has laid out the parameters: where this rank's masters lie."""

    def state_of(
        self, optimizer: torch.optim.Optimizer, flat: torch.Tensor, spec: ShardSpec
    ) -> dict[str, torch.Tensor]:
        """The live state of a tensor that the optimizer steps, made where the first step is yet to come.

        spec: of a parameter in it.
        """

    def steps_of(self, state: dict[str, torch.Tensor]) -> int:
        """How many steps the state has seen."""

    def set_steps(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Let the state have seen so many steps."""


def state_bytes(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of optimizer state for parameters, by name, without master copies of the weights."""
    return sum(4 * prod(shape) * len(recipe.kinds_of(name, shape)) for name, shape in shapes.items())


def set_learning_rate(groups: Sequence[dict[str, Any]], learning_rate: float) -> None:
    """Give each of a torch optimizer's parameter groups its rate of this step."""
    for group in groups:
        group["lr"] = learning_rate * group[RATE_FACTOR]
