"""What the numbers of a tensor are like, taken block by block."""

import math
from typing import NamedTuple

import torch

from megalite.inspection.blocks import BlockReader, Key, ranges_of


class Statistics(NamedTuple):
    """Of one tensor.

    norm, minimum, maximum: of its finite numbers; None for the latter two where there are none.
    num_nonfinite: infinities and NaN.
    """

    norm: float
    minimum: float | None
    maximum: float | None
    num_nonfinite: int


def statistics_of(reader: BlockReader, key: Key) -> Statistics:
    """Of one whole tensor, a few blocks of which are in memory at a time; sums are in float64."""
    norms, extremes, num_nonfinite = [0.0], [], 0
    for where in ranges_of(reader.shapes[key]):
        block = reader.read(key, where)
        if not block.sum().isfinite():  # the quick way to see that all are
            finite = block[block.isfinite()]
            num_nonfinite, block = num_nonfinite + block.numel() - finite.numel(), finite
        if block.numel():
            extremes += [float(extreme) for extreme in block.aminmax()]
            norms.append(float(torch.linalg.vector_norm(block, dtype=torch.float64)))
    low, high = (min(extremes), max(extremes)) if extremes else (None, None)
    return Statistics(math.hypot(*norms), low, high, num_nonfinite)
