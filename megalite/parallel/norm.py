"""RMSNorm over the features, with the sequence whole or cut (Zhang 2019, arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import nn

from megalite.parallel.context import Group
from megalite.parallel.mappings import copy_to_tp
from megalite.parallel.shard import constant_initializer, replicated_over, sharded_parameter


class ParallelRMSNorm(nn.Module):
    """x * weight / sqrt(mean(x^2) + eps) over the last dimension; twin of torch.nn.RMSNorm.

    Under sequence parallelism each rank sees its part of the sequence, so the weight's gradient is
    summed over the group, inside autograd: ZeRO-2 and 3 reduce in gradient hooks, later is too late.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        group: Group = None,
        sequence_parallel: bool = False,
        name: str = "norm",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group = group
        self.sequence_parallel = sequence_parallel
        spec = replicated_over(group, f"{name}.weight", (hidden_size,))
        self.weight = sharded_parameter(spec, constant_initializer(1.0), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] or [s/t, b, h], the shape kept."""
        weight = copy_to_tp(self.weight, self.group) if self.sequence_parallel else self.weight
        return F.rms_norm(x, weight.shape, weight, self.eps)
