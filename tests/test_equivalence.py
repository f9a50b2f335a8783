"""Every layout is the same run: losses, gradient norms and gradients of one plain PyTorch process.

The reference knows no DeepSpeed, no process group and no pipeline: one module, torch's AdamW and
clip_grad_norm_. All runs are fp32 with clipping active.

Tolerances: a layout sums the same numbers in another order, which in fp32 costs about 1e-7 relative a
sum; 1e-5 at the first step is a hundred of those. Adam divides by the root of a second moment, so
differences grow along the run: 1e-4 at the tenth step. A missing reduction is off by 1e-2 and more.
"""

from dataclasses import dataclass, field, replace
from itertools import product

import pytest
import torch
import torch.distributed as dist

from megalite.config.model import ModelConfig
from megalite.config.run import OptimizerConfig
from megalite.model.llama import LlamaStage
from megalite.training.engine import build_optimizer, initialize_communication
from megalite.training.zero import adam_state, master_slices
from tests.harness import run_distributed
from tests.replicas import (
    ADAM,
    CLIP,
    MODEL,
    SEED,
    TIED,
    Case,
    build_replica,
    global_batch,
    micro_batches,
)

NUM_STEPS = 10
HOLDS_GRADIENTS = OptimizerConfig(beta1=0.0, beta2=0.0, weight_decay=0.0)  # exp_avg is the gradient

CASES = [
    Case(zero=1),
    *(Case(tp=2, zero=zero, sp=zero % 2 == 1, tied=zero == 2) for zero in (0, 1, 2, 3)),
    Case(tp=2, sp=False, recompute="full"),
    Case(tp=4, recompute="selective"),
    Case(tp=4, sp=False, tied=True),
    *(Case(pp=2, zero=zero, schedule=s) for zero in (1, 2, 3) for s in ("1f1b", "afab")),
    Case(pp=2, zero=0, tied=True),
    Case(pp=2, zero=3, tied=True, gathering="micro_batch"),
    *(Case(pp=4, zero=zero, tied=True) for zero in (1, 2, 3)),
    Case(pp=4, schedule="afab", recompute="full"),
    Case(pp=4, gathering="micro_batch"),
    *(Case(dp=2, zero=zero, tied=zero == 3) for zero in (0, 1, 2, 3)),
    Case(tp=2, pp=2),
    Case(tp=2, pp=2, sp=False, schedule="afab", tied=True, recompute="selective"),
    Case(tp=2, pp=2, zero=0, tied=True),
    Case(tp=2, dp=2),
    Case(pp=2, dp=2, zero=1, tied=True),
    Case(pp=2, dp=2, zero=2, tied=True, schedule="afab"),
    Case(pp=2, dp=2, zero=3, tied=True),
    Case(tp=2, pp=2, dp=2),
    Case(tp=2, pp=2, dp=2, tied=True, schedule="afab", gathering="micro_batch", recompute="full"),
    *(Case(tp=2, pp=2, dp=2, zero=zero, tied=zero < 2) for zero in (0, 1, 2)),
    Case(tp=2, pp=2, documents=True, recompute="selective"),
    Case(pp=2, dp=2, documents=True, recompute="full"),
]


@dataclass
class Curve:
    """What a run gave: one loss and one gradient norm a step, and the first step's gradients."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def reference(model: ModelConfig, documents: bool = False) -> Curve:
    """One process, plain PyTorch, the whole batch at once."""
    curve = Curve()
    stage = LlamaStage(model, seed=SEED)
    optimizer = build_optimizer(stage, ADAM)
    for step in range(NUM_STEPS):
        loss = stage(*global_batch(step, documents))
        loss.backward()
        if step == 0:
            curve.gradients = _merge([(p.spec, 0, p.grad.flatten().clone()) for p in stage.parameters()])
        curve.norms.append(float(torch.nn.utils.clip_grad_norm_(stage.parameters(), CLIP)))
        curve.losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return curve


def run_case(rank: int, case: Case) -> Curve:
    initialize_communication()
    curve = Curve()
    replica = build_replica(rank, case, ADAM)
    for step in range(NUM_STEPS):
        if step == NUM_STEPS // 2:
            replica.evaluate(micro_batches(0, replica.context, case.documents))  # changes nothing
        result = replica.train_step(micro_batches(step, replica.context, case.documents), ADAM.learning_rate)
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
    curve.gradients = first_gradients(rank, case)
    return curve


def first_gradients(rank: int, case: Case) -> dict[str, torch.Tensor]:
    """Every full weight gradient of the first step, put together from the slices of all ranks."""
    replica = build_replica(rank, case, HOLDS_GRADIENTS)
    replica.train_step(micro_batches(0, replica.context, case.documents), ADAM.learning_rate)
    parts = []
    optimizer, context = replica.engine.optimizer, replica.context
    for piece in master_slices(optimizer, replica.engine.module.parameters(), context.dp_rank):
        gradient = piece.view(adam_state(optimizer, piece.flat)["exp_avg"]).clone()
        parts.append((piece.parameter.spec, piece.start, gradient))
    gathered = [None] * case.world_size
    dist.all_gather_object(gathered, parts)
    return _merge([part for parts in gathered for part in parts])


def _merge(parts: list) -> dict[str, torch.Tensor]:
    flats, full = {}, {}
    for spec, start, gradient in parts:
        local = flats.setdefault(spec, torch.full(spec.local_shape, torch.nan)).view(-1)
        local[start : start + gradient.numel()] = gradient
    for spec, local in flats.items():
        whole = full.setdefault(spec.name, torch.full(spec.full_shape, torch.nan))
        box = tuple(slice(a, a + n) for a, n in zip(spec.box_start, spec.box_shape, strict=True))
        whole[box] = local[tuple(slice(0, n) for n in spec.box_shape)]
    return full


@pytest.fixture(scope="module")
def references() -> dict[tuple[bool, bool], Curve]:
    """One process's curves by (tied, documents)."""
    keys = product((False, True), repeat=2)
    return {key: reference(TIED if key[0] else MODEL, documents=key[1]) for key in keys}


def assert_same_run(curve: Curve, expected: Curve, case: Case) -> None:
    for name in ("losses", "norms"):
        got, want = torch.tensor(getattr(curve, name)), torch.tensor(getattr(expected, name))
        relative = ((got - want) / want).abs()
        assert relative[0] < 1e-5, f"{case}: {name} at the first step: {got[0]} for {want[0]}"
        assert relative[-1] < 1e-4, f"{case}: {name} at the last step: {got[-1]} for {want[-1]}"
    assert curve.gradients.keys() == expected.gradients.keys()
    clip = min(1.0, CLIP / expected.norms[0])
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            curve.gradients[name],
            gradient * clip,
            rtol=1e-4,
            atol=1e-6 * gradient.abs().max().item(),
            msg=lambda text, name=name: f"{case}: gradient of {name}: {text}",
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_gives_the_losses_norms_and_gradients_of_one_process(case, references):
    for curve in run_distributed(run_case, case.world_size, case):
        assert_same_run(curve, references[case.tied, case.documents], case)


def test_the_comparison_notices_another_seed_and_clipping_is_active(references):
    other = replace(references[False, False])
    other.losses = [loss * (1 + 2e-5) for loss in other.losses]
    with pytest.raises(AssertionError, match="first step"):
        assert_same_run(other, references[False, False], CASES[0])
    assert min(references[False, False].norms) > CLIP


BF16_CASES = [
    Case(zero=1, precision="bf16"),
    Case(tp=2, zero=2, precision="bf16"),
    Case(pp=2, zero=1, tied=True, precision="bf16"),
    Case(tp=2, pp=2, tied=True, precision="bf16"),
    Case(dp=2, precision="bf16"),
]


@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16_stays_near_fp32_in_every_layout(case, references):
    """bf16 keeps 8 bits, so one rounding costs up to 4e-3; masters and gradient sums stay fp32.

    The loss averages 128 tokens' roundings: 1 % is allowed, and 5 % of the gradient norm, in which the
    errors of four layers add up. A lost micro batch or a norm counted twice would be off by 30 % and more.
    """
    expected = references[case.tied, case.documents]
    for curve in run_distributed(run_case, case.world_size, case):
        got = torch.tensor([curve.losses, curve.norms])
        want = torch.tensor([expected.losses, expected.norms])
        relative = ((got - want) / want).abs().amax(dim=1)
        assert relative[0] < 0.01 and relative[1] < 0.05, f"{case}: loss and norm are off by {relative}"
