"""Every layout is the same run: losses, gradient norms and gradients of transformers in one process.

The reference (tests/reference.py) knows no DeepSpeed, no process group, no pipeline, and nothing of our model
or optimizer. All runs are fp32 with clipping active.

Tolerances: a layout sums the same numbers in another order, which in fp32 costs about 1e-7 relative per
sum; 1e-5 at the first step is a hundred of those. Adam divides by the root of a second moment, so
differences grow along the run: ten times as much is allowed at the tenth step, in proportion between. A
missing reduction is off by 1e-2 and more. One layout of each kind takes ten steps, the others three: what
they get wrong shows at once, and in a model of eight layers a rounding grows tenfold in a step, so that one
process itself departs by 1e-4 in the fifth.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist

from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.products import has_onednn
from megalite.parallel.shard import spec_of
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer
from megalite.training.zero import inner_optimizer, master_slices
from tests.harness import run_distributed
from tests.reference import BETA1, CLIP, Curve, assert_same_numbers, learning_rate_of, reference_curve
from tests.trace import describe_departure
from tests.trainers import BIAS_RATE, SEED, Case, build_trainer, global_batch_of, micro_batches

NUM_STEPS, FEW_STEPS = 10, 3
ONEDNN = ["onednn"] if has_onednn() else []
HOLDS_GRADIENTS = OptimizerConfig(beta1=0.0, beta2=0.0, weight_decay=0.0)  # exp_avg is the gradient

CASES = [
    Case(zero=1),
    *(Case(tp=2, zero=zero, sp=zero % 2 == 1, tied=zero == 2) for zero in (0, 1, 2, 3)),
    Case(tp=2, sp=False, recompute="full"),
    Case(tp=2, row_chunks=2),
    Case(tp=2, memory=False),
    Case(tp=4, sp=False, memory=False, row_chunks=2, documents=True),
    Case(tp=4, row_chunks=3, recompute="full", documents=True),
    Case(tp=4, recompute="selective"),
    Case(tp=4, sp=False, tied=True),
    *(Case(pp=2, zero=zero, schedule=s) for zero in (1, 2, 3) for s in ("1f1b", "afab")),
    Case(pp=2, zero=0, tied=True),
    Case(pp=2, zero=3, tied=True, gathering="micro_batch"),
    *(Case(pp=4, zero=zero, tied=True) for zero in (1, 2, 3)),
    Case(pp=2, zero=2, layers=(3, 1)),
    *(Case(tp=2, zero=3, products=name) for name in ("torch", *ONEDNN)),  # auto is one of them
    Case(pp=2, tied=True, layers=(1, 3), gathering="micro_batch"),
    Case(tp=2, pp=2, zero=1, layers=(3, 1), schedule="afab", recompute="full"),
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
    *(Case(dp=2, zero=zero, uneven=True) for zero in (0, 1, 2, 3)),
    Case(tp=2, pp=2, uneven=True, documents=True),
    Case(pp=2, dp=2, zero=1, tied=True, uneven=True),
    Case(tp=2, tile=12),  # of 32 tokens: the last tile is shorter
    Case(tp=2, zero=2, sp=False, tile=8, recompute="full", offload=True),
    Case(dp=2, tile=8, gathering="micro_batch"),
    Case(tp=2, pp=2, zero=1, tied=True, tile=8, recompute="selective"),
]
H, V, L = "zb-h1", "zbv", "interleaved"
CHUNK_CASES = [
    *(Case(pp=2, zero=zero, schedule=L, tied=zero == 2) for zero in (1, 2, 3)),
    Case(pp=2, schedule=L, gathering="micro_batch", recompute="full"),
    Case(tp=2, pp=2, schedule=L, documents=True),
    Case(pp=4, schedule=L, tied=True, model_kind="deep"),
    *(Case(pp=2, zero=zero, schedule=H, tied=zero < 2) for zero in (0, 2, 3)),
    *(Case(tp=2, pp=2, zero=zero, schedule=H) for zero in (1, 3)),
    Case(tp=2, pp=2, schedule=H, weight_input="keep", recompute="full"),
    Case(tp=2, pp=2, zero=2, sp=False, schedule=H, uneven=True),
    Case(tp=2, pp=2, schedule=H, tile=8),
    Case(tp=2, pp=2, dp=2, schedule=H, memory=False),
    Case(tp=2, pp=2, zero=2, schedule=H, row_chunks=3, tied=True),
    *(Case(tp=2, pp=2, zero=1, schedule=H, tied=True, products=name) for name in ONEDNN),
    Case(pp=2, zero=1, schedule=V, tied=True, tile=8, recompute="full"),
    Case(tp=4, schedule=H, recompute="selective"),  # one stage; gradients of copies are summed later too
    Case(pp=4, schedule=H, tied=True),
    *(Case(pp=2, zero=zero, schedule=V, tied=zero != 2) for zero in (0, 1, 2, 3)),
    Case(pp=2, dp=2, schedule=V, tied=True, gathering="micro_batch", uneven=True),
    Case(
        tp=2, pp=2, zero=1, schedule=V, tied=True, weight_input="keep", documents=True, recompute="selective"
    ),
    Case(tp=2, pp=2, schedule=V, tied=True, model_kind="deep", layers=(2, 3, 2, 1)),
    Case(tp=2, pp=2, zero=1, schedule=L, tied=True, model_kind="deep", layers=(1, 2, 4, 1)),
    Case(pp=4, schedule=H, zero=2, tied=True, model_kind="deep", layers=(2, 3, 2, 1)),
    Case(pp=4, schedule=V, tied=True, model_kind="deep"),  # with fewer micro batches than fill the V
]
E = "experts"
LONG = [
    Case(zero=1),
    *(Case(tp=2, zero=zero) for zero in (1, 3)),
    *(Case(pp=2, zero=zero) for zero in (1, 2, 3)),
    *(Case(dp=2, zero=zero, tied=zero == 3) for zero in (0, 1, 2, 3)),
    Case(pp=2, schedule=H, zero=3),
    Case(pp=2, schedule=V, zero=1, tied=True),
    Case(dp=2, ep=2, model_kind=E),
    Case(tp=2, zero=1, model_kind=E),
]
EXPERT_CASES = [
    *(Case(zero=zero, model_kind=E) for zero in (0, 3)),
    *(Case(tp=2, zero=zero, sp=zero % 2 == 1, model_kind=E) for zero in (1, 2, 3)),
    Case(tp=2, sp=False, recompute="full", model_kind=E, padded=True),
    Case(tp=4, recompute="full", model_kind=E),
    *(Case(pp=2, zero=zero, schedule=s, model_kind=E) for zero, s in ((0, "afab"), (1, "1f1b"), (3, "afab"))),
    Case(pp=4, tied=True, model_kind=E),  # the first stage has no experts
    Case(pp=4, zero=1, recompute="full", model_kind=E),
    *(Case(dp=2, zero=zero, model_kind=E) for zero in (0, 1, 2, 3)),
    Case(dp=2, uneven=True, padded=True, model_kind=E),
    Case(dp=2, ep=2, model_kind=E),
    Case(dp=2, ep=2, recompute="full", padded=True, model_kind=E),
    Case(dp=4, ep=2, model_kind=E),
    Case(dp=4, ep=4, documents=True, model_kind=E),
    Case(tp=2, dp=2, ep=2, sp=False, model_kind=E),
    Case(tp=2, dp=2, ep=2, recompute="full", documents=True, model_kind=E),
    Case(pp=2, dp=2, ep=2, tied=True, model_kind=E),
    Case(pp=2, dp=2, ep=2, layers=(1, 3), model_kind=E),  # the first stage has no experts
    Case(pp=2, dp=2, ep=2, schedule="afab", gathering="micro_batch", model_kind=E),
    Case(tp=2, pp=2, model_kind=E),
    Case(tp=2, pp=2, zero=1, model_kind=E, tile=8),
    Case(tp=2, pp=2, dp=2, ep=2, model_kind=E),
    Case(tp=2, dp=2, ep=2, memory=False, model_kind=E),
    Case(tp=2, pp=2, dp=2, ep=2, tied=True, recompute="full", padded=True, model_kind=E),
    Case(tp=2, pp=2, dp=2, zero=1, model_kind=E),
    Case(pp=4, dp=2, ep=2, model_kind=E),  # a stage without experts has no part in their groups
    Case(model_kind="softmax", padded=True),
    Case(tp=2, pp=2, model_kind="softmax", recompute="full"),
    Case(tp=2, dp=2, ep=2, model_kind="softmax"),
    Case(pp=2, dp=2, zero=2, model_kind="softmax", padded=True),
    Case(pp=2, dp=2, ep=2, schedule=L, model_kind=E),
    Case(tp=2, pp=2, schedule=H, model_kind=E),
    Case(tp=2, pp=2, zero=1, schedule=V, tied=True, recompute="full", model_kind=E),
]
N, NE = "norms", "normed experts"
NORM_CASES = [
    Case(tp=2, zero=2, sp=False, model_kind=N),
    Case(tp=4, recompute="selective", model_kind=N),  # with copies of key heads
    Case(pp=2, dp=2, zero=1, tied=True, model_kind=N),
    Case(tp=2, dp=2, ep=2, sp=False, model_kind=NE),
]
BF16_CASES = [
    Case(zero=1, precision="bf16"),
    Case(tp=2, zero=2, precision="bf16"),
    Case(pp=2, zero=1, tied=True, precision="bf16"),
    Case(tp=2, pp=2, tied=True, precision="bf16"),
    Case(dp=2, precision="bf16"),
    *(Case(pp=2, zero=zero, schedule=V, tied=True, precision="bf16") for zero in (1, 3)),
    Case(dp=2, ep=2, precision="bf16", model_kind=E),
    Case(tp=2, zero=1, precision="bf16", model_kind=E),
]


@cache
def expected_of(case: Case, seed: int = SEED) -> Curve:
    """One process's curve."""
    batches = [global_batch_of(case, step) for step in range(NUM_STEPS)]
    return reference_curve(case.model, batches, seed, case.rate, BIAS_RATE)


def expected(case: Case) -> Curve:
    same = ("model_kind", "tied", "documents", "uneven", "padded", "precision")
    return expected_of(Case(**{name: getattr(case, name) for name in same}))


def curves_of(case: Case) -> list[Curve]:
    """Each rank's curve; ranks are started once for all cases of a kind that need as many."""
    outcome = outcome_of_world(case.world_size, case.model_kind, case.schedule in (H, V, L))
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome[case]


@cache
def outcome_of_world(
    world_size: int, model_kind: str, is_chunked: bool
) -> dict[Case, list[Curve]] | AssertionError:
    """The curves, or what went wrong: a world that failed is not started again for each of its cases."""
    every = CASES + CHUNK_CASES + EXPERT_CASES + NORM_CASES + BF16_CASES
    kind = (world_size, model_kind, is_chunked)
    cases = [case for case in every if (case.world_size, case.model_kind, case.schedule in (H, V, L)) == kind]
    try:
        by_rank = run_distributed(run_cases, world_size, cases, timeout_seconds=600)
    except AssertionError as error:
        return error
    return {case: [curves[i] for curves in by_rank] for i, case in enumerate(cases)}


def run_cases(rank: int, cases: list[Case], num_steps: int = NUM_STEPS) -> list[Curve]:
    initialize_communication()
    return [run_case(rank, case, num_steps=min(num_steps, steps_of(case))) for case in cases]


def steps_of(case: Case) -> int:
    return NUM_STEPS if case in LONG else FEW_STEPS


def run_case(rank: int, case: Case, seed: int = SEED, num_steps: int = NUM_STEPS) -> Curve:
    curve = Curve()
    trainer = build_trainer(rank, case, seed=seed)
    for step in range(num_steps):
        if step == num_steps // 2:
            trainer.evaluate(micro_batches(0, trainer.context, case))  # changes nothing
        result = trainer.train_step(
            micro_batches(step, trainer.context, case), case.rate * learning_rate_of(step)
        )
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
        if step == 0:
            curve.gradients = first_gradients(trainer, case)
        if result.experts is not None:
            curve.tokens.append(result.experts.tokens)
            curve.biases.append(result.experts.biases)
    return curve


def first_gradients(trainer: StageTrainer, case: Case) -> dict[str, torch.Tensor]:
    """Every full weight gradient of a first step, put together from the slices of all ranks; collective.

    Adam's first moment is then a part of it, of which the trainer's settings say nothing here.
    """
    return gradients_of_parts(parts_of_gradients(trainer, BETA1), case.world_size)


def gradients_of_step(trainer: StageTrainer, case: Case) -> dict[str, torch.Tensor]:
    """The same, of a trainer whose optimizer holds gradients; it takes the step."""
    trainer.train_step(micro_batches(0, trainer.context, case), 1e-3)
    return gradients_of_parts(parts_of_gradients(trainer), case.world_size)


def parts_of_gradients(trainer: StageTrainer, beta1: float = 0.0) -> list:
    """This rank's slices of what the optimizer was given in a first step."""
    parts = []
    optimizer = trainer.engine.optimizer
    for parameter in trainer.engine.module.parameters():
        spec = spec_of(parameter)
        data_rank = trainer.context[spec.averaged_over].rank
        for piece in master_slices(optimizer, [parameter], data_rank):
            state = inner_optimizer(optimizer).state[piece.flat]
            parts.append((spec, piece.start, piece.view(state["exp_avg"]) / (1 - beta1)))
    return parts


def gradients_of_parts(parts: list, world_size: int) -> dict[str, torch.Tensor]:
    """The full gradients, from the slices of all ranks; collective."""
    gathered = [None] * world_size
    dist.all_gather_object(gathered, parts)
    return _merge([part for parts in gathered for part in parts])


def _merge(parts: list) -> dict[str, torch.Tensor]:
    flats, full = {}, {}
    for spec, start, gradient in parts:
        local = flats.setdefault(spec, torch.full(spec.local_shape, torch.nan)).view(-1)
        local[start : start + gradient.numel()] = gradient
    for spec, local in flats.items():
        whole = full.setdefault(spec.name, torch.full(spec.full_shape, torch.nan))
        whole[spec.box] = local[tuple(slice(0, n) for n in spec.box_shape)]
    return full


def assert_same_gradients(curve: Curve, reference: Curve) -> None:
    assert curve.gradients.keys() == reference.gradients.keys()
    clip = min(1.0, CLIP / reference.norms[0])
    for name, gradient in reference.gradients.items():
        torch.testing.assert_close(
            curve.gradients[name],
            gradient * clip,
            rtol=1e-4,
            atol=2e-6 * clip * gradient.abs().max().item(),
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


@pytest.mark.parametrize("case", CASES + CHUNK_CASES + EXPERT_CASES + NORM_CASES, ids=str)
def test_every_layout_gives_the_losses_norms_and_gradients_of_one_process(case):
    curves = curves_of(case)
    try:
        for curve in curves:
            want, taken = expected(case), slice(steps_of(case))
            assert_same_numbers("loss", curve.losses, want.losses[taken], NUM_STEPS)
            assert_same_numbers("norm", curve.norms, want.norms[taken], NUM_STEPS)
            assert_same_gradients(curve, want)
            assert (curve.tokens, curve.biases) == (want.tokens[taken], want.biases[taken])
    except AssertionError as error:
        raise AssertionError(f"{error}\n{describe_departure(case)}") from error


def test_the_first_loss_hardly_depends_on_the_layout():
    """The README states the spread: largest minus smallest, relative; one fp32 rounding is 1.2e-7."""
    plain = [case for case in CASES if not (case.tied or case.documents or case.uneven)]
    losses = [curves_of(case)[0].losses[0] for case in plain]
    spread = (max(losses) - min(losses)) / min(losses)
    print(f"\nfirst loss over {len(plain)} layouts: spread {spread:.1e} relative")
    assert spread < 1e-6


def test_clipping_is_active_in_every_step():
    assert min(expected(CASES[0]).norms + expected(EXPERT_CASES[0]).norms) > CLIP


def test_control_another_seed_is_noticed_in_losses_norms_and_gradients():
    case = CASES[0]
    other = expected_of(case, seed=SEED + 1)
    with pytest.raises(AssertionError, match="loss of step 0"):
        assert_same_numbers("loss", other.losses, expected(case).losses)
    with pytest.raises(AssertionError, match="norm of step 0"):
        assert_same_numbers("norm", other.norms, expected(case).norms)
    with pytest.raises(AssertionError, match="gradient of model"):
        assert_same_gradients(other, expected(case))


@pytest.mark.parametrize("name", sorted(expected_of(CASES[0]).gradients))
def test_control_one_wrong_gradient_is_noticed(name):
    """As a reduction over two ranks that was forgotten in a part of one tensor: a hundredth of it halved."""
    curve = replace(expected(CASES[0]), norms=[0.0])
    curve.gradients = {key: gradient.clone() for key, gradient in curve.gradients.items()}
    flat = curve.gradients[name].view(-1)
    flat[: 1 + flat.numel() // 100] *= 0.5
    unclipped = replace(expected(CASES[0]), norms=[CLIP])
    with pytest.raises(AssertionError, match=f"gradient of {name}"):
        assert_same_gradients(curve, unclipped)


@pytest.mark.parametrize("quantity", ["loss", "norm"])
@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_control_a_small_difference_in_any_step_is_noticed(quantity, step):
    want = expected(CASES[0]).losses if quantity == "loss" else expected(CASES[0]).norms
    got = [value * (1 + 2e-4) if i == step else value for i, value in enumerate(want)]
    with pytest.raises(AssertionError, match=f"{quantity} of step {step}"):
        assert_same_numbers(quantity, got, want)


@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16_stays_near_fp32_in_every_layout(case):
    """bf16 keeps 8 bits, so one rounding costs up to 4e-3; masters and gradient sums stay fp32.

    The loss averages 128 tokens' roundings: 1 % is allowed, and 5 % of the gradient norm, in which the
    errors of four layers add up. A lost micro batch or a norm counted twice would be off by 30 % and more.
    """
    for curve in curves_of(case):
        got = torch.tensor([curve.losses, curve.norms])
        taken = slice(steps_of(case))
        want = torch.tensor([expected(case).losses[taken], expected(case).norms[taken]])
        relative = ((got - want) / want).abs().amax(dim=1)
        assert relative[0] < 0.01 and relative[1] < 0.05, f"{case}: loss and norm are off by {relative}"
