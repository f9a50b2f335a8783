"""AdamW (Loshchilov 2017, arXiv 1711.05101) as a recipe."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.adamw import AdamUpdate
from megalite.optimizer.kinds import kinds_of
from megalite.optimizer.recipe import ParameterGroup
from megalite.optimizer.slices import MasterSlice
from megalite.optimizer.stepper import STEP, AdamWStepper
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import ShardSpec, spec_of


class AdamW:
    """AdamW with weight decay on matrices alone.

    Three groups: one matrix alone, the other matrices, and the vectors. Alone is a tied embedding, so that
    its gradients can be told from others' in a flat partition; a stage without one sets another matrix
    apart, since every stage must have as many groups.

    update: what computes it, see kernels/adamw.py; None for torch.
    """

    def __init__(self, config: OptimizerConfig, update: AdamUpdate | None = None) -> None:
        self.config, self._update = config, update

    def kinds_of(self, name: str, full_shape: Sequence[int]) -> tuple[str, ...]:
        return kinds_of("adamw", name, full_shape)

    def groups(self, parameters: Sequence[nn.Parameter]) -> list[ParameterGroup]:
        trained = [p for p in parameters if p.requires_grad]
        matrices = [p for p in trained if len(spec_of(p).full_shape) > 1]
        tied = [p for p in matrices if spec_of(p).is_tied]
        alone = (tied or matrices)[:1]
        decay, no_decay = {"weight_decay": self.config.weight_decay}, {"weight_decay": 0.0}
        groups = [
            ParameterGroup(alone, settings=decay),
            ParameterGroup([p for p in matrices if p is not alone[0]], settings=decay),
            ParameterGroup([p for p in trained if len(spec_of(p).full_shape) == 1], settings=no_decay),
        ]
        return [group for group in groups if group.parameters]

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        return AdamWStepper([group.for_torch() for group in groups], self.config, self._update)

    def settle(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Mapping[nn.Parameter, MasterSlice],
        context: ParallelContext,
    ) -> None:
        """It works element by element, wherever they lie."""

    def state_of(
        self, optimizer: torch.optim.Optimizer, flat: torch.Tensor, spec: ShardSpec
    ) -> dict[str, torch.Tensor]:
        assert isinstance(optimizer, AdamWStepper)
        return optimizer.adam_state(flat)

    def steps_of(self, state: dict[str, torch.Tensor]) -> int:
        return int(state[STEP])

    def set_steps(self, state: dict[str, torch.Tensor], steps: int) -> None:
        state[STEP].fill_(steps)
