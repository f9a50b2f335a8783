"""The reduce-scatter by pieces against a sum in float64, also where the part lies in what is summed."""

import pytest
import torch
import torch.distributed as dist

from megalite.parallel import mappings
from megalite.training import reduction
from tests.harness import run_distributed

NUM_RANKS, PART = 4, 23  # no whole number of pieces of two or three
PIECES = (1, 2 * NUM_RANKS, 3 * NUM_RANKS, 1000)


def gradients(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(NUM_RANKS * PART, generator=torch.Generator().manual_seed(rank)).to(dtype)


def shipped(whole: torch.Tensor, part: torch.Tensor, group=None, **options) -> str:
    return "shipped"


def body(rank: int) -> dict:
    parts, most = {}, 0
    scatter = reduction.by_pieces(shipped)
    start = mappings.start_reduce_scatter

    def watched(x, group):
        nonlocal most
        most = max(most, x.numel())
        return start(x, group)

    mappings.start_reduce_scatter = watched
    for dtype in (torch.float32, torch.bfloat16):
        for piece in PIECES:
            reduction.REDUCTION_PIECE = piece
            whole = gradients(rank, dtype)
            part = whole.chunk(NUM_RANKS)[rank]  # as DeepSpeed gives it
            scatter(whole, part, group=dist.group.WORLD)
            parts[dtype, piece] = part
            assert most <= max(piece, NUM_RANKS)
            most = 0
    mappings.SUMMED_WHOLE = set()
    return parts | {"elsewhere": scatter(whole, part, group=dist.group.WORLD)}


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_distributed(body, NUM_RANKS)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3 * 2**-8)])
@pytest.mark.parametrize("piece", PIECES)
def test_each_rank_has_its_part_of_the_sum(found, dtype, bound, piece):
    """Three additions round three times, numbers of up to four: by 2**-24 of them, and in bf16 by 2**-9."""
    total = sum(gradients(rank, dtype).double() for rank in range(NUM_RANKS))
    for rank, expected in enumerate(total.chunk(NUM_RANKS)):
        torch.testing.assert_close(found[rank][dtype, piece].double(), expected, rtol=0, atol=4 * bound)


def test_a_device_that_scatters_itself_does(found):
    assert found[0]["elsewhere"] == "shipped"
