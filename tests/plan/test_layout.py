"""Which part of a model each rank of a pipeline holds."""

import pytest

from megalite.plan.flight import ChunkBytes, fullest_moment
from megalite.plan.layout import RankLayout, shares_of_rank, stages_of
from megalite.plan.tensors import tensors_of_rank
from tests.trainers import Case, deepspeed_of, run_config


@pytest.mark.parametrize(
    ("case", "held"),
    [
        (Case(pp=2), [[range(2)], [range(2, 4)]]),
        (Case(pp=2, layers=(1, 3)), [[range(1)], [range(1, 4)]]),
        (
            Case(pp=2, schedule="zbv", model_kind="deep", layers=(1, 4, 2, 1)),
            [[range(1), range(7, 8)], [range(1, 5), range(5, 7)]],
        ),
        (
            Case(pp=2, schedule="interleaved", model_kind="deep", layers=(1, 4, 2, 1)),
            [[range(1), range(5, 7)], [range(1, 5), range(7, 8)]],
        ),
    ],
    ids=str,
)
def test_ranks_hold_the_layers_of_their_stages(case, held):
    run = run_config(case)
    placement = stages_of(run)
    shares = [shares_of_rank(run, placement, rank) for rank in range(2)]
    assert [[share.layers for share in of_rank] for of_rank in shares] == held


def test_gradients_are_there_by_the_layers_of_the_chunks_that_went_backward():
    """Rank 1 has 1 and 5 layers; the backward of the second chunk is the first, and the fullest moment."""
    case = Case(pp=2, zero=0, schedule="zbv", model_kind="deep", layers=(1, 1, 5, 1))
    layout = RankLayout(run_config(case), deepspeed_of(case, 1), 2, 1)
    chunks = [ChunkBytes(kept=10, left=0, forward=0, backward=work) for work in (0, 1000)]
    assert fullest_moment(layout, "cpu", gradients=600, chunks=chunks).gradients == 500


def test_a_shared_table_has_its_gradient_when_the_head_went_backward():
    """Rank 0 of a V has both ends; the backward of the head's chunk is the first, and the fullest moment."""
    case = Case(pp=2, zero=0, schedule="zbv", model_kind="deep", tied=True)
    layout = RankLayout(run_config(case), deepspeed_of(case, 1), 2, 0)
    chunks = [ChunkBytes(kept=10, left=0, forward=0, backward=work) for work in (0, 10**9)]
    numbers = {tensor.row.name: tensor.numel for tensor in tensors_of_rank(layout)}
    first = ("model.layers.0.", "model.layers.1.")
    of_first = sum(number for name, number in numbers.items() if name.startswith(first))
    everything = sum(numbers.values())
    found = fullest_moment(layout, "cpu", gradients=everything, chunks=chunks).gradients
    assert found == pytest.approx(everything - of_first, rel=0.05)  # the table's padding goes by parts
