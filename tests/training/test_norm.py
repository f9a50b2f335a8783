"""All gradients set to 1: the global norm is the root of the number of parameters, in every layout.

A parameter that is counted twice, or by no rank, or a gradient that is summed over one rank too many,
shows at once, whatever the model computes.
"""

from functools import cache
from math import sqrt

import pytest
import torch

from megalite.model.flops import num_parameters
from megalite.parallel.shard import spec_of
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import Case, build_trainer, micro_batches

CASES = [
    *(Case(tp=2, pp=2, zero=zero, tied=tied) for zero in (0, 1, 2, 3) for tied in (False, True)),
    *(Case(tp=4, zero=zero, sp=zero % 2 == 0) for zero in (0, 1, 2, 3)),  # 2 key/value heads: copies
    *(Case(tp=2, dp=2, zero=zero, tied=True) for zero in (0, 1, 2, 3)),
    *(Case(pp=4, zero=zero, tied=True) for zero in (0, 1, 2, 3)),
    Case(pp=2, dp=2, gathering="micro_batch"),
    Case(pp=2, dp=2, zero=1, precision="bf16"),
    *(Case(tp=2, pp=2, zero=zero, model_kind="experts") for zero in (0, 1, 2, 3)),
    Case(tp=4, model_kind="experts"),
    Case(pp=4, model_kind="experts", tied=True),
    *(Case(dp=4, ep=ep, model_kind="experts") for ep in (1, 2, 4)),
    Case(tp=2, dp=2, ep=2, sp=False, model_kind="experts"),
    Case(pp=2, dp=2, ep=2, tied=True, model_kind="experts"),
    *(Case(cp=2, tp=2, zero=zero, tied=True) for zero in (0, 3)),
    Case(cp=2, pp=2, zero=1, tied=True, way="ring"),
    Case(cp=2, dp=2, ep=4, model_kind="experts"),
]


def set_to_one(parameter, num_micro_batches, context):
    """From now on each backward gives 1 per micro batch's share, in what counts of the parameter."""
    spec = spec_of(parameter)
    ones = torch.zeros(spec.local_shape)
    box = tuple(slice(0, size) for size in spec.box_shape)
    ones[box] = 1 / num_micro_batches / (2 if spec.is_tied else 1)  # tied: two stages' are summed
    # An expert on fewer ranks sees the tokens of the others too.
    ones *= context["dp", "cp"].size / context[spec.averaged_over].size

    def replace(gradient):
        return ones.to(gradient, copy=True).view(gradient.shape)

    parameter.register_hook(replace)


def norms(rank, cases):
    initialize_communication()
    found = []
    for case in cases:
        trainer = build_trainer(rank, case)
        batches = micro_batches(0, trainer.context)
        for parameter in trainer.engine.module.parameters():
            set_to_one(parameter, len(batches), trainer.context)
        found.append(trainer.train_step(batches, 1e-3).grad_norm)
    return found


@cache
def norms_by_rank():
    return run_distributed(norms, 4, CASES, timeout_seconds=200)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_one_have_the_norm_of_their_number(case):
    expected = sqrt(num_parameters(case.model))
    for rank in norms_by_rank():
        assert rank[CASES.index(case)] == pytest.approx(expected, rel=1e-5)
