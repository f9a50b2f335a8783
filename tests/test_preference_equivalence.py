"""Preference tuning in every layout is the plain loop: losses, rewards, norms and gradients of one process.

The reference is transformers' model with the papers' formulas written out; tolerances are those of
tests/test_equivalence.py.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megalite.batch import IGNORED, Batch
from megalite.config.run import RunConfig
from megalite.config.tuning import LoraConfig, PreferenceConfig
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer, build_context
from tests.harness import run_distributed
from tests.reference import (
    CLIP,
    Curve,
    WrittenOutAdamW,
    assert_same_numbers,
    learning_rate_of,
    transformers_model,
)
from tests.test_equivalence import (
    HOLDS_GRADIENTS,
    assert_same_gradients,
    gradients_of_parts,
    parts_of_gradients,
)
from tests.trainers import (
    ADAM,
    BATCH,
    MICRO_BATCH,
    MODEL,
    SEED,
    SEQ_LENGTH,
    Case,
    deepspeed_config,
    run_config,
)

NUM_STEPS = 5
DPO = PreferenceConfig(beta=0.3)
SIMPO = PreferenceConfig(loss="simpo", beta=2.0, margin=0.7)
CASES = [
    (Case(zero=0), DPO),
    (Case(tp=2, zero=1), DPO),
    (Case(tp=2, sp=False, zero=2), SIMPO),
    (Case(pp=2), DPO),
    (Case(pp=2, zero=1, schedule="afab", tied=True), SIMPO),
    (Case(dp=2), DPO),
    (Case(dp=2, zero=1), SIMPO),
    (Case(tp=2, pp=2, recompute="full"), DPO),
    (Case(tp=2, dp=2, tied=True), DPO),
    (Case(pp=2, dp=2, zero=2), DPO),
]
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def global_pairs(step: int) -> Batch:
    """BATCH pairs, 2 BATCH rows: prompts of one length a pair, answers of 1 to 8 tokens, padding."""
    generator = torch.Generator().manual_seed(2000 + step)
    ids = torch.randint(MODEL.vocab_size, (2 * BATCH, SEQ_LENGTH), generator=generator)
    prompts = torch.randint(2, 7, (BATCH,), generator=generator).repeat_interleave(2)
    answers = torch.randint(1, 9, (2 * BATCH,), generator=generator)
    ids[1::2] = torch.where(torch.arange(SEQ_LENGTH) < prompts[::2, None], ids[::2], ids[1::2])
    place = torch.arange(SEQ_LENGTH)
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    learnt = (place >= prompts[:, None] - 1) & (place < (prompts + answers)[:, None] - 1)
    references = -4.6 * answers + torch.randn(2 * BATCH, generator=generator)
    return Batch(ids, labels.where(learnt, IGNORED), references=references)


def pairs_of(step: int, trainer: StageTrainer) -> list[Batch]:
    dp = trainer.context["dp"]
    mine = global_pairs(step).split(dp.size)[dp.rank]
    return mine.split(BATCH // dp.size // MICRO_BATCH)


def written_out(
    theirs: torch.nn.Module, batch: Batch, config: PreferenceConfig
) -> tuple[torch.Tensor, list[float]]:
    """Loss and the numbers of NAMES, pair by pair."""
    logps = theirs(batch.input_ids).logits.log_softmax(-1)
    losses, told = [], []
    for pair in range(BATCH):
        rewards = []
        for row in (2 * pair, 2 * pair + 1):
            places = [i for i, label in enumerate(batch.labels[row]) if label != -100]
            log_p = sum(logps[row, i, batch.labels[row, i]] for i in places)
            if config.loss == "simpo":
                rewards.append(config.beta / len(places) * log_p)
            else:
                rewards.append(config.beta * (log_p - batch.references[row]))
        chosen, rejected = rewards
        losses.append((1 + (-(chosen - rejected - config.margin)).exp()).log())
        told.append([float(x) for x in (chosen, rejected, chosen - rejected, chosen > rejected)])
    return sum(losses) / BATCH, [sum(column) / BATCH for column in zip(*told, strict=True)]


@cache
def expected_of(tied: bool, simpo: bool) -> tuple[Curve, list[list[float]]]:
    model = MODEL.model_copy(update={"tie_word_embeddings": tied})
    theirs = transformers_model(model, SEED)
    curve, told, optimizer = Curve(), [], WrittenOutAdamW(theirs.parameters())
    for step in range(NUM_STEPS):
        loss, numbers = written_out(theirs, global_pairs(step), SIMPO if simpo else DPO)
        loss.backward()
        if step == 0:
            curve.gradients = {name: p.grad.clone() for name, p in theirs.named_parameters()}
        norm = sum(p.grad.double().square().sum() for p in theirs.parameters()).sqrt().item()
        optimizer.step(learning_rate_of(step), min(1.0, CLIP / (norm + 1e-6)))
        curve.losses.append(loss.item())
        curve.norms.append(norm)
        told.append(numbers)
    return curve, told


@cache
def curves_of_world(world_size: int) -> list:
    cases = [pair for pair in CASES if pair[0].world_size == world_size]
    by_rank = run_distributed(run_cases, world_size, cases, timeout_seconds=600)
    return [[curves[i] for curves in by_rank] for i in range(len(cases))]


def run_cases(rank: int, cases: list) -> list:
    initialize_communication()
    return [run_case(rank, case, config) for case, config in cases]


def build(rank: int, case: Case, config: PreferenceConfig, optimizer=ADAM) -> StageTrainer:
    run: RunConfig = run_config(case, optimizer, task="prefer", preference=config, lora=LoraConfig())
    context = build_context(run, rank, case.world_size, torch.device("cpu"))
    return StageTrainer(run, deepspeed_config(case), context)


def run_case(rank: int, case: Case, config: PreferenceConfig) -> tuple[Curve, list[list[float]]]:
    curve, told, trainer = Curve(), [], build(rank, case, config)
    for step in range(NUM_STEPS):
        if step == 2:
            trainer.evaluate(pairs_of(0, trainer))  # changes nothing
        result = trainer.train_step(pairs_of(step, trainer), learning_rate_of(step))
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
        told.append([result.further[name] for name in NAMES])
    holder = build(rank, case, config, HOLDS_GRADIENTS)
    holder.train_step(pairs_of(0, holder), 1e-3)
    curve.gradients = gradients_of_parts(parts_of_gradients(holder), case.world_size)
    return curve, told


@pytest.mark.parametrize(
    ("case", "config"), CASES, ids=lambda x: x.loss if isinstance(x, PreferenceConfig) else str(x)
)
def test_every_layout_gives_the_numbers_of_the_plain_loop(case, config):
    place = [pair for pair in CASES if pair[0].world_size == case.world_size].index((case, config))
    want, wanted = expected_of(case.tied, config.loss == "simpo")
    for curve, told in curves_of_world(case.world_size)[place]:
        assert_same_numbers("loss", curve.losses, want.losses)
        assert_same_numbers("norm", curve.norms, want.norms)
        unclipped = replace(want, norms=[max(CLIP, want.norms[0])])
        assert_same_gradients(curve, unclipped)
        torch.testing.assert_close(torch.tensor(told), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
