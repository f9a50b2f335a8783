"""An embedding whose rows lie on many ranks (Shoeybi 2019, section 3)."""

import torch
import torch.nn.functional as F
from torch import nn

from megalite.parallel.context import ParallelContext
from megalite.parallel.mappings import reduce_from_tp, scatter_sequence
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import (
    ShardSpec,
    cut_spec,
    describe_shards,
    draw_like_embedding,
    sharded_parameter,
)
from megalite.parallel.vocabulary import padded_vocab_size


def vocabulary_spec(context: ParallelContext, name: str, shape: tuple[int, int]) -> ShardSpec:
    """Spec of a table [vocabulary, h], embedding or head, whose padded rows are cut over tp."""
    padded_size = padded_vocab_size(shape[0], context["tp"].size)
    return cut_spec(context, name, shape, 0, padded_size=padded_size)


class VocabParallelEmbedding(nn.Module):
    """y[s, b] = table[ids], with rows [r V/t, (r+1) V/t) on rank r; twin of torch.nn.Embedding.

        dtable_r[v] = sum of dy[s, b] where ids[s, b] = v, for this rank's rows v

    Under sequence parallelism y is [s/t, b, h] and dy is gathered first. tied: a copy of the table is the
    head on another stage.
    """

    reads_weight_in_backward = False  # ZeRO-3 need not gather it for that: see training/unread.py

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        plan: LayerPlan | None = None,
        *,
        name: str = "",
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.plan = plan = plan or LayerPlan()
        self.leave = scatter_sequence if plan.sequence_parallel else reduce_from_tp
        full_name = f"{name}.weight" if name else "weight"
        spec = vocabulary_spec(plan.context, full_name, (num_embeddings, embedding_dim))
        spec = spec.tied_over_stages(copy=0) if tied else spec
        self.num_local = spec.local_shape[0]
        self.first_id = spec.cuts[0].piece * self.num_local
        self.weight = sharded_parameter(spec, plan.init or draw_like_embedding, plan.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [s, b] -> [s, b, h], or [s/t, b, h] under sequence parallelism."""
        local = ids - self.first_id
        elsewhere = (local < 0) | (local >= self.num_local)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.plan.tp_group)

    def extra_repr(self) -> str:
        return describe_shards(self)
