"""With compiled parts every layout is the same run still, and compiles in its first step alone.

The reference and the tolerances are those of tests/test_equivalence.py. Ranks begin with an empty cache on
disk, so that all of them compile the same parts at the same time.
"""

import os
from functools import cache, partial

import pytest
import torch
from torch._dynamo.utils import counters

from megalite.kernels.compiled import missing_compiler
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.reference import Curve, assert_same_numbers
from tests.test_equivalence import (
    FEW_STEPS,
    HOLDS_GRADIENTS,
    NUM_STEPS,
    assert_same_gradients,
    expected,
    gradients_of_step,
    run_case,
)
from tests.trainers import Case, build_trainer

MISSING = missing_compiler(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"torch.compile finds no {MISSING}")

compiled = partial(Case, compiled=True)
CASES = [
    compiled(tp=2, zero=1, documents=True, recompute="selective"),
    compiled(dp=2, zero=3, recompute="full", offload=True, uneven=True),
    compiled(pp=2, zero=2, schedule="zb-h1", tied=True),
    compiled(pp=2, zero=0, tied=True),
    compiled(tp=2, zero=2, sp=False, tied=True),
    compiled(dp=2, ep=2, model_kind="experts", padded=True, gathering="micro_batch"),
]
BF16 = compiled(tp=2, zero=2, precision="bf16")
MOST_GRAPHS = 1 + 2 + 2  # norms; rotations of queries and keys; gatings of layers and shared experts


@cache
def outcomes_of_world(folder: str) -> dict[Case, list[tuple[Curve, int]]] | AssertionError:
    """Of each case, what every rank got, and how many graphs it compiled for it; or what went wrong."""
    cases = [*CASES, BF16]
    try:
        by_rank = run_distributed(train_compiled, 2, cases, folder, timeout_seconds=800)
    except AssertionError as error:
        return error
    return {case: [results[i] for results in by_rank] for i, case in enumerate(cases)}


def outcomes(folder: str) -> dict[Case, list[tuple[Curve, int]]]:
    found = outcomes_of_world(folder)
    if isinstance(found, AssertionError):
        raise found
    return found


def train_compiled(rank: int, cases: list[Case], folder: str) -> list[tuple[Curve, int]]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    initialize_communication()
    return [_train(rank, case) for case in cases]


def _train(rank: int, case: Case) -> tuple[Curve, int]:
    """Three steps, a validation among them; and the gradients of one, of weights that ZeRO-3 lets go."""
    torch._dynamo.reset()
    counters.clear()
    before = counters["stats"]["unique_graphs"]
    curve = run_case(rank, case, num_steps=FEW_STEPS)
    options = {"stage3_param_persistence_threshold": 0} if case.zero == 3 else {}
    curve.gradients = gradients_of_step(build_trainer(rank, case, HOLDS_GRADIENTS, **options), case)
    assert not counters["graph_break"], counters["graph_break"]
    return curve, counters["stats"]["unique_graphs"] - before


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_parts_give_the_losses_norms_and_gradients_of_one_process(case, cold):
    for curve, _ in outcomes(cold)[case]:
        want = expected(case)
        assert_same_numbers("loss", curve.losses, want.losses[:FEW_STEPS], NUM_STEPS)
        assert_same_numbers("norm", curve.norms, want.norms[:FEW_STEPS], NUM_STEPS)
        assert_same_gradients(curve, want)


def test_compiled_parts_stay_near_fp32_in_bf16(cold):
    """As far as tests/test_equivalence.py allows without them."""
    want = expected(BF16)
    for curve, _ in outcomes(cold)[BF16]:
        torch.testing.assert_close(curve.losses, want.losses[:FEW_STEPS], rtol=0.01, atol=0)
        torch.testing.assert_close(curve.norms, want.norms[:FEW_STEPS], rtol=0.05, atol=0)


@pytest.mark.parametrize("case", [*CASES, BF16], ids=str)
def test_no_step_compiles_what_one_before_it_has(case, cold):
    """Over steps, micro batches, four layers, a validation and a second trainer."""
    for _, graphs in outcomes(cold)[case]:
        assert 0 < graphs <= MOST_GRAPHS
