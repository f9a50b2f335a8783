"""In fp8 every layout is the same run: transformers in one process, its linear layers written out in fp8.

The reference (tests/reference.py, tests/fp8_reference.py) takes the micro batches one after another, since
scales are theirs. All runs are fp32 around the products, with clipping active.

Tolerances: a layout sums in another order, 1e-7 relative, which puts about one number in a million on the
other side of a boundary between two numbers of 8 bits, an eighth (e5m2: a quarter) of itself away. A step
rounds some 10^5 numbers, so that most steps agree to 1e-6 and some do not: a number that fell otherwise, one
of 64 or more in a sum, was seen to change a loss by up to 5e-6, a norm by 4e-4 and a tensor's gradient by
2e-5. Allowed are 1e-4, 2e-3 and 1e-2. Scales of the rank alone are off by 7e-4, 2e-3 and 0.17 and more in the
first step; the recipes by row hardly tell, since a scale that is a power of two changes no mantissa: for
these see tests/parallel/test_fp8.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from megalite.batch import Batch
from megalite.parallel import fp8
from megalite.parallel.fp8 import RECIPES
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer, build_context
from tests.fp8_reference import with_fp8
from tests.harness import run_distributed
from tests.reference import (
    CLIP,
    Curve,
    Routers,
    WrittenOutAdamW,
    learning_rate_of,
    mean_loss,
    transformers_model,
    under_our_names,
)
from tests.test_equivalence import run_cases
from tests.trainers import (
    BATCH,
    MICRO_BATCH,
    MODEL,
    SEED,
    SEQ_LENGTH,
    Case,
    deepspeed_of,
    global_batch_of,
    run_config,
)

NUM_STEPS = 2
LOSS, NORM, GRADIENT = 1e-4, 2e-3, 1e-2  # relative
TENSOR, ROW, ROW_AND_BF16 = RECIPES
SHAPE = {"model_kind": "aligned"}
ALONE = [Case(tp=2, fp8=TENSOR, **SHAPE), Case(cp=2, way="ring", fp8=TENSOR, **SHAPE)]
CASES = [
    Case(fp8=TENSOR, **SHAPE),
    *ALONE,
    Case(tp=2, sp=False, zero=2, fp8=ROW, **SHAPE),
    Case(tp=2, fp8=TENSOR, model_kind="aligned experts"),
    *(Case(dp=2, zero=zero, fp8=name, **SHAPE) for zero, name in zip((1, 2, 3), RECIPES, strict=True)),
    Case(pp=2, fp8=TENSOR, recompute="full", **SHAPE),
    Case(tp=4, fp8=TENSOR, **SHAPE),  # with copies of key heads
    Case(tp=4, fp8=ROW_AND_BF16, recompute="selective", **SHAPE),
    Case(tp=2, pp=2, fp8=TENSOR, schedule="zb-h1", **SHAPE),
    Case(tp=2, pp=2, fp8=ROW, schedule="zb-h1", weight_input="keep", **SHAPE),
    Case(tp=2, cp=2, zero=1, fp8=TENSOR, **SHAPE),
]


@cache
def expected_of(model_kind: str, recipe: str) -> Curve:
    """One process's curve, and its first gradients, clipped."""
    model = Case(model_kind=model_kind).model
    llama, curve = with_fp8(transformers_model(model, SEED), recipe), Curve()
    routers, optimizer = Routers(llama, model), WrittenOutAdamW(llama.parameters())
    for step in range(NUM_STEPS):
        micro_batches = global_batch_of(Case(), step).split(BATCH // MICRO_BATCH)
        total, tokens = 0.0, []
        for micro_batch in micro_batches:
            loss = mean_loss(llama, micro_batch) / len(micro_batches)
            loss.backward()
            total += loss.item()
            tokens.append(routers.tokens(micro_batch))
        norm = sum(p.grad.double().square().sum() for p in llama.parameters()).sqrt().item()
        clip = min(1.0, CLIP / (norm + 1e-6))
        if step == 0:
            curve.gradients = under_our_names({n: p.grad * clip for n, p in llama.named_parameters()})
        routers.move({i: _sum(of_layer[i] for of_layer in tokens) for i in routers.gates}, 0.01)
        optimizer.step(learning_rate_of(step), clip)
        curve.losses.append(total)
        curve.norms.append(norm)
    return curve


def _sum(lists) -> list[int]:
    return [sum(counts) for counts in zip(*lists, strict=True)]


def cases_in_world(rank: int, world_size: int) -> dict[str, list[Curve]]:
    """Of all cases, and of some with scales of the rank alone."""
    curves = {"cases": run_cases(rank, cases_of(CASES, world_size), NUM_STEPS)}
    fp8._largest_over = lambda peak, group: peak  # this process ends with the world
    return curves | {"alone": run_cases(rank, cases_of(ALONE, world_size), 1)}


def cases_of(cases: list[Case], world_size: int) -> list[Case]:
    return [case for case in cases if case.world_size == world_size]


@cache
def worlds(world_size: int) -> list[dict[str, list[Curve]]]:
    return run_distributed(cases_in_world, world_size, world_size, timeout_seconds=300)


def curves_of(case: Case, which: str = "cases") -> list[Curve]:
    cases = CASES if which == "cases" else ALONE
    place = cases_of(cases, case.world_size).index(case)
    return [curves[which][place] for curves in worlds(case.world_size)]


def differences(curve: Curve, case: Case) -> dict[str, float]:
    """The largest of all steps, and of all tensors of the first one; relative."""
    want = expected_of(case.model_kind, case.fp8)
    assert curve.gradients.keys() == want.gradients.keys()
    of_gradients = [(curve.gradients[n] - g).norm() / g.norm() for n, g in want.gradients.items()]
    return {
        "loss": _furthest(curve.losses, want.losses),
        "norm": _furthest(curve.norms, want.norms),
        "gradient": max(of_gradients).item(),
    }


def _furthest(got: list[float], want: list[float]) -> float:
    return max(abs(mine / theirs - 1) for mine, theirs in zip(got, want, strict=False))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_gives_the_losses_norms_and_gradients_of_one_process_in_fp8(case):
    for curve in curves_of(case):
        assert len(curve.losses) == NUM_STEPS
        found = differences(curve, case)
        assert found["loss"] < LOSS and found["norm"] < NORM and found["gradient"] < GRADIENT, found


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_control_scales_of_the_rank_alone_part_from_it(case):
    found = differences(curves_of(case, "alone")[0], case)
    assert found["loss"] > 5 * LOSS and found["gradient"] > 10 * GRADIENT, found


@pytest.mark.parametrize("case", [CASES[0], ALONE[0]], ids=str)
def test_control_without_fp8_the_numbers_are_others(case):
    found = differences(curves_of(case)[0], replace(case, fp8=ROW))
    assert found["loss"] > 2 * LOSS and found["gradient"] > 5 * GRADIENT, found


# A long run, in bf16 as it is meant.
LONG_STEPS = 300


def chain_batch(step: int) -> Batch:
    """Samples of a language: each token has four that may follow it, one of them half the time."""
    generator, always = torch.Generator().manual_seed(step), torch.Generator().manual_seed(0)
    following = torch.randint(MODEL.vocab_size, (MODEL.vocab_size, 4), generator=always)
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0])
    tokens = [torch.randint(MODEL.vocab_size, (BATCH,), generator=generator)]
    for _ in range(SEQ_LENGTH):
        choice = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        tokens.append(following[tokens[-1], choice])
    tokens = torch.stack(tokens, dim=1)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def long_runs(rank: int, recipes: Sequence[str]) -> dict[str, list[float]]:
    """Each recipe's losses; a step is one micro batch, which takes less time."""
    initialize_communication()
    losses = {}
    for name in recipes:
        case = Case(zero=1, precision="bf16", fp8=name, **SHAPE)
        run, deepspeed = run_config(case), deepspeed_of(case, num_micro_batches=1)
        trainer = StageTrainer(run, deepspeed, build_context(run, rank, 1, torch.device("cpu")))
        steps = range(LONG_STEPS)
        losses[name] = [trainer.train_step([chain_batch(step)], 3e-3).loss for step in steps]
    return losses


def test_300_steps_stay_near_bf16():
    """Within 0.5 % of bf16's mean loss in every 50 steps, falling from 4.6 nats to 1.45.

    Means of 6,400 tokens' losses; each recipe moves them by up to 0.25 %. This is a distance and no proof of
    the scales, which is above: a model so small hardly needs them, and stays within 0.35 % without.
    """
    plain, *rounded = long_world()[0].values()
    for losses in rounded:
        for start in range(0, LONG_STEPS, 50):
            mean, without = (sum(run[start : start + 50]) / 50 for run in (losses, plain))
            assert abs(mean / without - 1) < 0.005, (start, mean, without)
    assert sum(plain[-50:]) / 50 < 1.5


def long_world() -> list[dict[str, list[float]]]:
    return run_distributed(long_runs, 1, ("none", TENSOR, ROW), timeout_seconds=400)
