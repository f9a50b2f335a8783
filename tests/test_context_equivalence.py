"""Sequences cut over ranks are the same run, in every way of attention: as in tests/test_equivalence.py.

Three steps: by the third, optimizer state, tied weights and the experts' biases have had their say.
"""

from functools import cache

import pytest
import torch

from tests.harness import run_distributed
from tests.reference import Curve, assert_same_numbers, reference_curve
from tests.test_equivalence import assert_same_gradients, run_cases
from tests.trainers import BIAS_RATE, SEED, Case, global_batch_of

NUM_STEPS = 3
WAYS = ("gather", "ring", "heads")
E = "experts"
CASES = [
    *(Case(cp=2, zero=zero, way=way) for zero, way in ((3, "gather"), (1, "ring"), (2, "heads"))),
    *(
        Case(cp=2, zero=zero, way=way, documents=True, uneven=True, tied=True)
        for zero, way in ((0, "gather"), (3, "ring"), (1, "heads"))
    ),
    Case(cp=2, recompute="full", documents=True, model_kind="norms"),
    Case(cp=2, tp=2, documents=True, recompute="selective", way="ring"),
    *(Case(cp=2, way=way, documents=True, memory=False) for way in WAYS),
    Case(cp=2, tp=2, sp=False, zero=1, way="heads", documents=True),
    Case(cp=2, pp=2, zero=2, documents=True, tied=True),
    Case(cp=2, pp=2, schedule="afab", recompute="full", uneven=True, way="ring"),
    Case(cp=2, dp=2, zero=3, uneven=True, documents=True, way="heads"),
    Case(cp=2, dp=2, zero=0, uneven=True, documents=True, way="ring"),
    *(Case(cp=4, way=way, documents=True) for way in WAYS),  # heads: more ranks than key/value heads
    Case(cp=2, tp=2, pp=2, documents=True, tied=True),
]
EXPERT_CASES = [
    Case(cp=2, model_kind=E, zero=1, documents=True, padded=True),
    Case(cp=2, model_kind="softmax", padded=True, way="ring"),
    Case(cp=2, tp=2, ep=2, model_kind="softmax", recompute="full"),
    Case(cp=2, dp=2, ep=4, model_kind=E, uneven=True, way="heads"),
]
BF16_CASES = [Case(cp=2, way=way, documents=True, precision="bf16") for way in ("gather", "ring")]


@cache
def expected_of(case: Case) -> Curve:
    batches = [global_batch_of(case, step) for step in range(NUM_STEPS)]
    return reference_curve(case.model, batches, SEED, case.rate, BIAS_RATE)


def expected(case: Case) -> Curve:
    same = ("model_kind", "tied", "documents", "uneven", "padded", "precision")
    return expected_of(Case(**{name: getattr(case, name) for name in same}))


def curves_of_world(world_size: int) -> dict[Case, list[Curve]]:
    outcome = outcome_of_world(world_size)
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome


@cache
def outcome_of_world(world_size: int) -> dict[Case, list[Curve]] | AssertionError:
    cases = [case for case in CASES + EXPERT_CASES + BF16_CASES if case.world_size == world_size]
    try:
        by_rank = run_distributed(run_cases, world_size, cases, NUM_STEPS, timeout_seconds=600)
    except AssertionError as error:
        return error
    return {case: [curves[i] for curves in by_rank] for i, case in enumerate(cases)}


@pytest.mark.parametrize("case", CASES + EXPERT_CASES, ids=str)
def test_a_cut_sequence_gives_the_losses_norms_and_gradients_of_one_process(case):
    for curve in curves_of_world(case.world_size)[case]:
        assert_same_numbers("loss", curve.losses, expected(case).losses)
        assert_same_numbers("norm", curve.norms, expected(case).norms)
        assert_same_gradients(curve, expected(case))
        assert (curve.tokens, curve.biases) == (expected(case).tokens, expected(case).biases)


@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16_stays_near_fp32(case):
    """As in tests/test_equivalence.py, with its reasons: 1 % of the loss, 5 % of the norm."""
    for curve in curves_of_world(case.world_size)[case]:
        got, want = (torch.tensor([c.losses, c.norms]) for c in (curve, expected(case)))
        relative = ((got - want) / want).abs().amax(dim=1)
        assert relative[0] < 0.01 and relative[1] < 0.05, f"{case}: loss and norm are off by {relative}"
