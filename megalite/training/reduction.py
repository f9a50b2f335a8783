"""ZeRO-3's reduce-scatter where the device's own would sum everything on every rank, as gloo's does."""

from typing import Any

import torch

from megalite.parallel import mappings
from megalite.parallel.context import Group, group_size
from megalite.plan.buckets import REDUCTION_PIECE

ReduceScatter = Any  # DeepSpeed's: (whole [n], part [n/t], group) -> None


def by_pieces(reduce_scatter: ReduceScatter) -> ReduceScatter:
    """DeepSpeed's function, in whose place such a device exchanges a piece of each rank's part at a time.

    So it takes a few megabytes, not a copy of the gradients.
    """

    def reduce_scatter_by_pieces(
        whole: torch.Tensor, part: torch.Tensor, group: Group = None, **options: Any
    ) -> Any:
        if whole.device.type not in mappings.SUMMED_WHOLE or group_size(group) == 1:
            return reduce_scatter(whole, part, group=group, **options)
        parts = whole.view(group_size(group), -1)
        size = max(1, REDUCTION_PIECE // group_size(group))
        for start in range(0, part.numel(), size):
            piece = slice(start, start + size)
            total, work = mappings.start_reduce_scatter(parts[:, piece].flatten(), group)
            mappings.wait_for(work)
            part[piece] = total  # may lie in `whole`, in this rank's row, which is sent by now
        return None

    return reduce_scatter_by_pieces
