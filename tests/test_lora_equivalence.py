"""Adapters train in every layout as PEFT's do in one process: losses, norms, and gradients of both factors.

B is not zero: beside a zero B the gradient of A is zero, whatever is wrong with it. The base is transformers'
model, and neither PEFT nor tests/reference.py knows DeepSpeed, a process group, or anything of our layers. In
tolerances and in the rest this is tests/test_equivalence.py.
"""

from functools import cache
from unittest.mock import patch

import peft
import pytest
import torch
from peft.utils import transformers_weight_conversion as peft_conversion

from megalite.config.tuning import LoraConfig
from megalite.training.checkpoints import live_pieces
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer
from tests.harness import run_distributed
from tests.reference import (
    CLIP,
    Curve,
    WrittenOutAdamW,
    assert_same_numbers,
    learning_rate_of,
    mean_loss,
    transformers_model,
)
from tests.test_equivalence import assert_same_gradients, first_gradients
from tests.trainers import SEED, Case, build_trainer, global_batch_of, micro_batches

NUM_STEPS = 4
ALL = LoraConfig().targets
LORA = LoraConfig(rank=3, alpha=6.0)
STABLE = LoraConfig(rank=4, alpha=8.0, rank_stabilized=True, targets=["q_proj", "v_proj", "down_proj"])
CASES = [
    *((Case(zero=zero), LORA) for zero in (0, 3)),
    *((Case(tp=2, zero=zero, tied=zero == 2), LORA) for zero in (0, 1, 2, 3)),
    (Case(tp=2, sp=False), LORA),
    (Case(tp=2, recompute="full", documents=True), STABLE),
    (Case(tp=4), LORA),  # with copies of key and value heads
    (Case(tp=4, sp=False, zero=1), STABLE),
    (Case(pp=2, zero=1), LORA),
    (Case(pp=2, tied=True, gathering="micro_batch"), LORA),
    (Case(pp=2, schedule="interleaved", tied=True), LORA),
    (Case(dp=2, zero=2), LORA),
    (Case(dp=2, recompute="selective"), STABLE),
    (Case(tp=2, pp=2), LORA),
    (Case(tp=2, dp=2, uneven=True), LORA),
    (Case(pp=2, dp=2, schedule="afab", tied=True), LORA),
    (Case(tp=2, pp=2, dp=2, recompute="full"), LORA),
    (Case(tp=2, pp=2, dp=2, zero=1, tied=True, sp=False), LORA),
    (Case(cp=2, documents=True, way="ring"), LORA),
    (Case(cp=2, tp=2, zero=1, uneven=True), STABLE),
    (Case(tp=2, zero=1, model_kind="experts"), LORA),  # of the attention, the dense and the shared layers
    (Case(tp=2, pp=2, dp=2, ep=2, model_kind="experts"), LORA),
]


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Both factors, by their names; large enough to matter beside the base."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return 0.1 * torch.randn(shape, generator=generator)


@torch.no_grad()
def fill_adapters(trainer: StageTrainer) -> None:
    for piece in live_pieces(trainer.engine):
        if "lora_" in piece.name and piece.kind == "weight":
            box = tuple(slice(a, a + n) for a, n in zip(piece.box_start, piece.box_shape, strict=True))
            flat = draw(piece.name, piece.full_shape)[box].reshape(-1)
            piece.tensor.copy_(flat[piece.flat_start :][: piece.tensor.numel()])


def our_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def target_modules(case: Case, lora: LoraConfig) -> str:
    """As an expression for PEFT, which is to leave the routed experts alone."""
    where = "(self_attn|layers\\.0\\.mlp|shared_experts)" if case.model.n_routed_experts else ".*"
    return rf".*{where}\.({'|'.join(lora.targets)})"


@cache
def expected_of(case: Case, rank: int, alpha: float, stable: bool, targets: str) -> Curve:
    """PEFT around transformers in one process.

    For a model with experts PEFT would make other adapters of these names, of the routed experts as
    transformers holds them in memory: it is not let.
    """
    options = {"r": rank, "lora_alpha": alpha, "use_rslora": stable, "target_modules": targets}
    with patch.object(peft_conversion, "get_checkpoint_conversion_mapping", lambda model_type: None):
        model = peft.get_peft_model(transformers_model(case.model, SEED), peft.LoraConfig(**options))
    trained = {our_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(draw(name, tuple(parameter.shape)))
    curve, optimizer = Curve(), WrittenOutAdamW(trained.values())
    for step in range(NUM_STEPS):
        loss = mean_loss(model, global_batch_of(case, step))
        loss.backward()
        if step == 0:
            curve.gradients = {name: p.grad.clone() for name, p in trained.items()}
        norm = sum(p.grad.double().square().sum() for p in trained.values()).sqrt().item()
        optimizer.step(learning_rate_of(step), min(1.0, CLIP / (norm + 1e-6)))
        curve.losses.append(loss.item())
        curve.norms.append(norm)
    return curve


def expected(case: Case, lora: LoraConfig) -> Curve:
    same = ("model_kind", "tied", "documents", "uneven")
    plain = Case(**{name: getattr(case, name) for name in same})
    return expected_of(plain, lora.rank, lora.alpha, lora.rank_stabilized, target_modules(case, lora))


@cache
def curves_of_world(world_size: int) -> list[list[Curve]]:
    """By case, each rank's curve."""
    cases = [pair for pair in CASES if pair[0].world_size == world_size]
    by_rank = run_distributed(run_cases, world_size, cases, timeout_seconds=600)
    return [[curves[i] for curves in by_rank] for i in range(len(cases))]


def run_cases(rank: int, cases: list) -> list[Curve]:
    initialize_communication()
    return [run_case(rank, case, lora) for case, lora in cases]


def run_case(rank: int, case: Case, lora: LoraConfig) -> Curve:
    curve, trainer = Curve(), build_trainer(rank, case, lora=lora)
    fill_adapters(trainer)
    frozen = frozen_weights(trainer)
    for step in range(NUM_STEPS):
        result = trainer.train_step(micro_batches(step, trainer.context, case), learning_rate_of(step))
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
        if step == 0:
            curve.gradients = first_gradients(trainer, case)
    assert frozen and all(torch.equal(a, b) for a, b in zip(frozen, frozen_weights(trainer), strict=True))
    return curve


def frozen_weights(trainer: StageTrainer) -> list[torch.Tensor]:
    """What this rank holds of the base, biases of routers among it."""
    return [p.tensor.clone() for p in live_pieces(trainer.engine) if "lora_" not in p.name]


@pytest.mark.parametrize(
    ("case", "lora"), CASES, ids=lambda x: str(x) if isinstance(x, Case) else f"r{x.rank}"
)
def test_adapters_have_the_losses_norms_and_gradients_of_peft(case, lora):
    place = [pair for pair in CASES if pair[0].world_size == case.world_size].index((case, lora))
    want = expected(case, lora)
    assert min(want.norms) > CLIP
    for curve in curves_of_world(case.world_size)[place]:
        assert_same_numbers("loss", curve.losses, want.losses)
        assert_same_numbers("norm", curve.norms, want.norms)
        assert_same_gradients(curve, want)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_control_a_gradient_of_one_of_two_ranks_is_noticed(factor):
    want = expected(Case(), LORA)
    curve = Curve(gradients={name: g * (0.5 if factor in name else 1) for name, g in want.gradients.items()})
    with pytest.raises(AssertionError, match=f"gradient of .*{factor}"):
        assert_same_gradients(curve, Curve(norms=[CLIP], gradients=want.gradients))
