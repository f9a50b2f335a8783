"""The torch optimizer that takes AdamW's steps, by torch's fused update or by another package's kernel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.adamw import AdamRule, AdamTensors, AdamUpdate
from megalite.optimizer.eager_adamw import EagerAdamW
from megalite.optimizer.kinds import ADAM_KINDS

STEP = "step"


class AdamWStepper(EagerAdamW):
    """torch's AdamW, with its groups and its state; `update` computes in its place, None leaves it to torch.

    ZeRO hands tensors over in several calls for one step, so each counts its own steps.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        config: OptimizerConfig,
        update: AdamUpdate | None = None,
    ) -> None:
        super().__init__(
            [dict(group) for group in groups],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            # One pass over memory, and none of it taken for intermediate results. The kernels of others take
            # the count of steps from the host, where torch keeps it for what is not fused.
            fused=update is None,
        )
        self._kernel = update

    def adam_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept for a tensor, made before the first step as torch makes it in that."""
        state: dict[str, torch.Tensor] = self.state[flat]
        if not state:
            device = flat.device if self.defaults["fused"] else torch.device("cpu")
            state[STEP] = torch.zeros((), dtype=torch.float32, device=device)
            for kind in ADAM_KINDS:
                state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step the tensors that have a gradient."""
        if self._kernel is None:
            return super().step(closure)
        assert closure is None, "DeepSpeed gives none"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for t, parameters in self._counted(group["params"]).items():
                states = [self.state[parameter] for parameter in parameters]
                means, square_means = ([state[kind] for state in states] for kind in ADAM_KINDS)
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                rule = AdamRule(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], t)
                self._kernel(AdamTensors(gradients, parameters, means, square_means), rule)

    def _counted(self, parameters: Sequence[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        """Count a step of those that have a gradient; they by their counts."""
        counted: dict[int, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                state = self.adam_state(parameter)
                state[STEP] += 1
                counted.setdefault(int(state[STEP]), []).append(parameter)
        return counted
