"""QK-clip (Kimi K2, arXiv 2507.20534, section 2.1): heads whose attention logits grow too large are scaled.

After a step, the rows of a head in the query projection are multiplied by gamma = min(1, tau / its largest
logit), which multiplies its logits by gamma. The paper gives query and key the root of it each; the query
alone lets each head have a factor of its own where several share a key.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from megalite.model.attention import ParallelAttention
from megalite.model.logit_peaks import LogitPeaks
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import spec_of
from megalite.parallel.topology import DATA_AXES

QUERY = ".q_proj.weight"


class QkClip:
    """Watches the attention of a stage; heads lie on tensor-parallel ranks as the rows of their queries do.

    threshold: tau, the largest logit that is let be.
    """

    def __init__(self, threshold: float, chunks: Iterable[nn.Module], context: ParallelContext) -> None:
        self.threshold, self._data = threshold, context[DATA_AXES]
        self._queries: list[nn.Parameter] = []
        self._peaks: list[LogitPeaks] = []
        self._head_dim = 1
        for attention in (m for chunk in chunks for m in chunk.modules() if isinstance(m, ParallelAttention)):
            query = next(p for p in attention.parameters() if spec_of(p).name.endswith(QUERY))
            self._head_dim = attention.head_dim
            attention.peaks = LogitPeaks(spec_of(query).local_shape[0] // attention.head_dim, context.device)
            self._queries.append(query)
            self._peaks.append(attention.peaks)

    def begin_step(self) -> None:
        """Call before the forwards of a step."""
        for peaks in self._peaks:
            peaks.clear()

    def row_factors(self) -> dict[nn.Parameter, torch.Tensor]:
        """gamma of each local row of each query projection, by the logits of the whole batch; collective."""
        largest = torch.stack([peaks.values for peaks in self._peaks])
        if self._data.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._data.group)
        gamma = self.threshold / largest.clamp(min=self.threshold)
        rows = gamma.repeat_interleave(self._head_dim, dim=1)
        return dict(zip(self._queries, rows, strict=True))
