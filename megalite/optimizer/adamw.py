"""AdamW (Loshchilov 2017, arXiv 1711.05101) as a recipe; the one home of Adam's names."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from megalite.config.optimizer import OptimizerConfig
from megalite.optimizer.eager_adamw import EagerAdamW
from megalite.optimizer.kinds import ADAM_KINDS, kinds_of
from megalite.optimizer.recipe import ParameterGroup
from megalite.optimizer.slices import MasterSlice
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import ShardSpec, spec_of

STEP = "step"


class AdamW:
    """AdamW with weight decay on matrices alone.

    Three groups: one matrix alone, the other matrices, and the vectors. Alone is a tied embedding, so that
    its gradients can be told from others' in a flat partition; a stage without one sets another matrix
    apart, since every stage must have as many groups.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

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
        config = self.config
        return EagerAdamW(
            [group.for_torch() for group in groups],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,  # one pass over memory, and none of it taken for intermediate results
        )

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
        state = optimizer.state[flat]
        if not state:  # as torch makes it: the count on the device where the step is fused
            on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            device = flat.device if on_device else torch.device("cpu")
            state[STEP] = torch.zeros((), dtype=torch.float32, device=device)
            for kind in ADAM_KINDS:
                state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        return state

    def steps_of(self, state: dict[str, torch.Tensor]) -> int:
        return int(state[STEP])

    def set_steps(self, state: dict[str, torch.Tensor], steps: int) -> None:
        state[STEP].fill_(steps)
