"""An embedding whose rows lie on many ranks (Shoeybi 2019, section 3)."""

from math import ceil

import torch
import torch.nn.functional as F
from torch import nn

from megalite.parallel.context import Group, group_size
from megalite.parallel.linear import DEFAULT_INITIALIZER
from megalite.parallel.mappings import reduce_from_tp, scatter_sequence
from megalite.parallel.shard import Initializer, ShardSpec, cut_over, sharded_parameter


def padded_vocab_size(vocab_size: int, tp_size: int, multiple: int = 128) -> int:
    """The vocabulary rounded up so that each rank holds a multiple of `multiple` rows.

    Padding exists only in memory: never in a checkpoint, an export, or the loss.
    """
    return ceil(vocab_size / (multiple * tp_size)) * multiple * tp_size


def vocabulary_spec(
    group: Group, name: str, shape: tuple[int, int], *, tied: bool = False, is_owner: bool = True
) -> ShardSpec:
    """Spec of a table [vocabulary, h], embedding or head, whose padded rows are cut over a group.

    tied: the table has a copy on another stage. is_owner: False for that copy.
    """
    padded_size = padded_vocab_size(shape[0], group_size(group))
    return cut_over(group, name, shape, dim=0, padded_size=padded_size, tied=tied, is_owner=is_owner)


class VocabParallelEmbedding(nn.Module):
    """Rows [r V/t, (r+1) V/t) of the table on rank r; twin of torch.nn.Embedding."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: Group = None,
        sequence_parallel: bool = False,
        name: str = "embedding",
        init: Initializer = DEFAULT_INITIALIZER,
        dtype: torch.dtype | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.leave = scatter_sequence if sequence_parallel else reduce_from_tp
        spec = vocabulary_spec(group, f"{name}.weight", (num_embeddings, embedding_dim), tied=tied)
        self.num_local = spec.local_shape[0]
        self.first_id = spec.piece * self.num_local
        self.weight = sharded_parameter(spec, init, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [s, b] -> [s, b, h], or [s/t, b, h] under sequence parallelism."""
        local = ids - self.first_id
        elsewhere = (local < 0) | (local >= self.num_local)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)
