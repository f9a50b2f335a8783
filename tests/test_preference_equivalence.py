"""Preference tuning in every layout is the plain loop: losses, rewards, norms and gradients of one process.

The reference is transformers' model with the papers' formulas written out; tolerances are those of
tests/test_equivalence.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch

from megalite.batch import IGNORED, Batch
from megalite.config.logging import LoggingConfig
from megalite.config.run import RunConfig
from megalite.config.tuning import LoraConfig, PreferenceConfig
from megalite.parallel.context import ParallelContext
from megalite.training.engine import initialize_communication
from megalite.training.loop import validate
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
from tests.test_equivalence import assert_same_gradients, first_gradients
from tests.trainers import (
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
CONFIGS = {
    "dpo": PreferenceConfig(beta=0.3),
    "simpo": PreferenceConfig(loss="simpo", beta=2.0, margin=0.7),
    "kto": PreferenceConfig(loss="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.8),
    "cut off": PreferenceConfig(loss="kto", beta=0.4),  # with a reference point that would be below 0
}
CASES = [
    (Case(zero=0), "dpo"),
    (Case(tp=2, zero=1), "dpo"),
    (Case(tp=2, sp=False, zero=2), "simpo"),
    (Case(pp=2), "dpo"),
    (Case(pp=2, zero=1, schedule="afab", tied=True), "simpo"),
    (Case(dp=2), "dpo"),
    (Case(dp=2, zero=1), "simpo"),
    (Case(tp=2, pp=2, recompute="full"), "dpo"),
    (Case(tp=2, dp=2, tied=True), "dpo"),
    (Case(pp=2, dp=2, zero=2), "dpo"),
    (Case(zero=0), "kto"),
    (Case(zero=3), "cut off"),
    (Case(tp=2, zero=1), "kto"),
    (Case(tp=2, gathering="micro_batch"), "kto"),
    (Case(pp=2), "kto"),
    (Case(pp=2, zero=2, schedule="afab", tied=True), "kto"),
    (Case(dp=2, zero=1), "kto"),
    (Case(dp=2), "cut off"),
    (Case(tp=2, pp=2, sp=False, zero=0), "kto"),
    (Case(tp=2, dp=2, recompute="full"), "kto"),
    (Case(pp=2, dp=2), "kto"),
    (Case(dp=4, zero=2, tied=True), "kto"),
    (Case(cp=2, zero=1), "dpo"),
    (Case(cp=2, way="ring"), "simpo"),
    (Case(cp=2, pp=2, way="heads"), "dpo"),
    (Case(cp=2, dp=2, zero=2, way="ring"), "kto"),
    (Case(pp=2, schedule="zbv", tied=True), "dpo"),
    (Case(pp=2, zero=1, schedule="interleaved"), "kto"),
]
HELD_OUT = 2  # batches
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
UNPAIRED_NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")


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


def global_answers(step: int, config: PreferenceConfig) -> Batch:
    """BATCH answers, unevenly desirable, and as many mismatched rows, whose references move the point."""
    pairs = global_pairs(step)
    own, others = (pairs.map(lambda x, side=side: x[side::2]) for side in (0, 1))
    desirable = torch.tensor([step % 2 == 0, True, False, True, True, False, False, True])
    moved = 9.0 if config == CONFIGS["cut off"] else -9.0
    mismatched = replace(others, references=others.references + moved)
    return replace(own, desirable=desirable, mismatched=mismatched)


def global_samples(step: int, config: PreferenceConfig) -> Batch:
    return global_answers(step, config) if config.loss == "kto" else global_pairs(step)


class Samples(NamedTuple):
    """This rank's part of them, as a loader gives them."""

    context: ParallelContext
    config: PreferenceConfig

    def batch(self, consumed_samples: int) -> list[Batch]:
        dp = self.context["dp"]
        mine = global_samples(consumed_samples // BATCH, self.config).split(dp.size)[dp.rank]
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
        told.append([x.item() for x in (chosen, rejected, chosen - rejected, chosen > rejected)])
    return sum(losses) / BATCH, [sum(column) / BATCH for column in zip(*told, strict=True)]


def kto_written_out(
    theirs: torch.nn.Module, batch: Batch, config: PreferenceConfig
) -> tuple[torch.Tensor, list[float]]:
    """Loss and the numbers of UNPAIRED_NAMES, answer by answer."""

    def ratios(rows: Batch) -> list[torch.Tensor]:
        logps = theirs(rows.input_ids).logits.log_softmax(-1)
        places = [[i for i, label in enumerate(labels) if label != -100] for labels in rows.labels]
        sums = [sum(logps[row, i, rows.labels[row, i]] for i in at) for row, at in enumerate(places)]
        return [log_p - reference for log_p, reference in zip(sums, rows.references, strict=True)]

    with torch.no_grad():
        divergence = max(0.0, sum(x.item() for x in ratios(batch.mismatched)) / BATCH)
    losses, sides = [], {True: [], False: []}
    for ratio, desirable in zip(ratios(batch), batch.desirable.tolist(), strict=True):
        sides[desirable].append(config.beta * ratio.item())
        if desirable:
            worth = 1 / (1 + (-config.beta * (ratio - divergence)).exp())
            losses.append(config.desirable_weight * (1 - worth))
        else:
            worth = 1 / (1 + (-config.beta * (divergence - ratio)).exp())
            losses.append(config.undesirable_weight * (1 - worth))
    chosen, rejected = (sum(side) / len(side) for side in (sides[True], sides[False]))
    return sum(losses) / BATCH, [chosen, rejected, chosen - rejected, divergence]


@torch.no_grad()
def held_out(theirs: torch.nn.Module, config: PreferenceConfig) -> list[float]:
    """Means over the first samples, of which each batch has as many: all pairs, or each side's answers."""
    batches = [global_samples(step, config) for step in range(HELD_OUT)]
    columns = list(zip(*(formula_of(config)(theirs, batch, config)[1] for batch in batches), strict=True))
    if config.loss != "kto":
        return [sum(column) / HELD_OUT for column in columns]
    numbers = [sum(batch.desirable).item() for batch in batches]
    chosen = sum(x * n for x, n in zip(columns[0], numbers, strict=True)) / sum(numbers)
    others = [BATCH - n for n in numbers]
    rejected = sum(x * n for x, n in zip(columns[1], others, strict=True)) / sum(others)
    return [chosen, rejected, chosen - rejected, sum(columns[3]) / HELD_OUT]


def formula_of(config: PreferenceConfig) -> Callable:
    return kto_written_out if config.loss == "kto" else written_out


@cache
def expected_of(tied: bool, name: str) -> tuple[Curve, list[list[float]]]:
    """The curve, and further numbers: of two held-out batches at the start, then of each step."""
    model = MODEL.model_copy(update={"tie_word_embeddings": tied})
    theirs = transformers_model(model, SEED)
    config, curve, optimizer = CONFIGS[name], Curve(), WrittenOutAdamW(theirs.parameters())
    told = [held_out(theirs, config)]
    for step in range(NUM_STEPS):
        loss, numbers = formula_of(config)(theirs, global_samples(step, config), config)
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
    cases = [(case, name) for case, name in CASES if case.world_size == world_size]
    by_rank = run_distributed(run_cases, world_size, cases, timeout_seconds=600)
    return [[curves[i] for curves in by_rank] for i in range(len(cases))]


def run_cases(rank: int, cases: list) -> list:
    initialize_communication()
    return [run_case(rank, case, CONFIGS[name]) for case, name in cases]


def build(rank: int, case: Case, config: PreferenceConfig) -> StageTrainer:
    run: RunConfig = run_config(case, task="prefer", preference=config, lora=LoraConfig())
    context = build_context(run, rank, case.world_size, torch.device("cpu"))
    return StageTrainer(run, deepspeed_config(case), context)


def run_case(rank: int, case: Case, config: PreferenceConfig) -> tuple[Curve, list[list[float]]]:
    curve, trainer = Curve(), build(rank, case, config)
    samples, names = Samples(trainer.context, config), UNPAIRED_NAMES if config.loss == "kto" else NAMES
    run = RunConfig(logging=LoggingConfig(validation_steps=HELD_OUT))
    validation = validate(trainer, samples, run.logging.validation_steps, lambda: None)
    told = [[validation[f"validation_{name}"] for name in names]]
    for step in range(NUM_STEPS):
        if step == 2:
            trainer.evaluate(samples.batch(0))  # changes nothing
        result = trainer.train_step(samples.batch(step * BATCH), learning_rate_of(step))
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
        if step == 0:
            curve.gradients = first_gradients(trainer, case)
        told.append([result.further[name] for name in names])
    return curve, told


@pytest.mark.parametrize(("case", "name"), CASES, ids=str)
def test_every_layout_gives_the_numbers_of_the_plain_loop(case, name):
    place = [pair for pair in CASES if pair[0].world_size == case.world_size].index((case, name))
    want, wanted = expected_of(case.tied, name)
    for curve, told in curves_of_world(case.world_size)[place]:
        assert_same_numbers("loss", curve.losses, want.losses)
        assert_same_numbers("norm", curve.norms, want.norms)
        unclipped = replace(want, norms=[max(CLIP, want.norms[0])])
        assert_same_gradients(curve, unclipped)
        torch.testing.assert_close(torch.tensor(told), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_the_reference_point_is_once_above_zero_and_once_cut_off():
    for name, is_cut_off in (("kto", False), ("cut off", True)):
        points = [numbers[UNPAIRED_NAMES.index("kl")] for numbers in expected_of(False, name)[1]]
        assert all((point == 0) == is_cut_off for point in points)
