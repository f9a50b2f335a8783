"""RMSNorm over the features, with the sequence whole or cut (Zhang 2019, arXiv 1910.07467)."""

import torch
from torch import nn

from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import constant_initializer, describe_shards, sharded_parameter, whole_spec


class ParallelRMSNorm(nn.Module):
    """y = n * weight with n = x / sqrt(mean(x^2) + eps) over the last dimension; twin of torch.nn.RMSNorm.

        dweight = sum over s, b of dy * n

    Where each rank sees a part of x, dweight is summed over the ranks as well: under sequence parallelism a
    part of s, and with sees_heads the heads of that rank.
    """

    def __init__(
        self,
        hidden_size: int,
        plan: LayerPlan | None = None,
        *,
        eps: float = 1e-5,
        name: str = "",
        sees_heads: bool = False,
    ) -> None:
        super().__init__()
        self.plan = plan = plan or LayerPlan()
        self.eps = eps
        full_name = f"{name}.weight" if name else "weight"
        is_summed = plan.sequence_parallel or sees_heads
        spec = whole_spec(plan.context, full_name, (hidden_size,), is_summed=is_summed)
        self.weight = sharded_parameter(spec, constant_initializer(1.0), plan.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h], [s/t, b, h] or heads [s, b, A/t, h], the shape kept."""
        weight = self.plan.with_whole_gradient(self.weight)
        return self.plan.kernels.norm(x, weight, self.eps)

    def extra_repr(self) -> str:
        return f"{describe_shards(self)}; eps={self.eps}"
