"""Rank 0 asks the model in training for logits: those of transformers, in any layout; and training goes on.

Tolerance: fp32 sums in another order, a hundred roundings of the largest logit, as between any two layouts.
bf16: eight of its roundings (2**-9) of the largest logit, over four layers, against a reference in fp32.
"""

from functools import cache

import pytest
import torch

from megalite.training.engine import initialize_communication
from megalite.training.live_model import LiveModel
from tests.harness import run_distributed
from tests.reference import learning_rate_of, transformers_model
from tests.trainers import MODEL, SEED, SEQ_LENGTH, Case, build_trainer, micro_batches

CASES = [
    Case(zero=1),
    Case(tp=2, zero=1),
    Case(tp=2, sp=False),
    Case(pp=2),
    Case(dp=2, tied=True),
    Case(tp=2, pp=2, tied=True),
    Case(pp=2, dp=2, zero=2),
    Case(pp=2, dp=2, schedule="zbv", tied=True),  # the head is on the first rank
    Case(pp=2, schedule="interleaved"),
    Case(dp=2, ep=2, model_kind="experts"),
    Case(tp=4, model_kind="norms"),
    Case(tp=2, pp=2, dp=2, ep=2, model_kind="experts"),
    Case(pp=2, dp=2, zero=1, precision="bf16"),
    Case(cp=2, dp=2, zero=2, way="ring"),
    Case(cp=4),
    Case(cp=2, tp=2, pp=2, way="heads"),
]
TOLERANCE = 1e-5
BF16_TOLERANCE = 2**-6
IDS = torch.randint(MODEL.vocab_size, (3, 7), generator=torch.Generator().manual_seed(5))
LONGER = torch.randint(MODEL.vocab_size, (8, SEQ_LENGTH + 3), generator=torch.Generator().manual_seed(6))
STARTS = torch.tensor([0, 2, 5])


def questions(ask):
    return [ask(IDS, None), ask(IDS, STARTS), ask(LONGER, None)]


@cache
def answers_of_world(world_size):
    cases = [case for case in CASES if case.world_size == world_size]
    by_rank = run_distributed(ask_cases, world_size, cases, timeout_seconds=300)
    return {case: [answers[i] for answers in by_rank] for i, case in enumerate(cases)}


def ask_cases(rank, cases):
    initialize_communication()
    return [LiveModel(build_trainer(rank, case)).lead(questions) for case in cases]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_logits_are_those_of_transformers(case):
    first, *others = answers_of_world(case.world_size)[case]
    assert others == [None] * (case.world_size - 1)
    theirs = transformers_model(case.model, SEED).eval()
    tolerance = BF16_TOLERANCE if case.precision == "bf16" else TOLERANCE
    padded = (torch.arange(IDS.size(1)) >= STARTS.unsqueeze(1)).long()
    with torch.no_grad():
        places = (padded.cumsum(1) - 1).clamp(min=0)
        wanted = [
            theirs(IDS).logits,
            theirs(IDS, attention_mask=padded, position_ids=places).logits,
            theirs(LONGER).logits,
        ]
    for got, want, real in zip(first, wanted, (None, padded, None), strict=True):
        assert got.shape == want.shape
        difference = (got - want).abs().amax(-1)
        if real is not None:
            difference = difference * real
        assert difference.max() < tolerance * want.abs().max()


def curve(rank, case, asks):
    initialize_communication()
    trainer = build_trainer(rank, case)
    live, found = LiveModel(trainer), []
    for step in range(4):
        result = trainer.train_step(micro_batches(step, trainer.context, case), learning_rate_of(step))
        found.append((result.loss, result.grad_norm, result.experts))
        if asks:
            live.lead(questions)
    return found


@pytest.mark.parametrize("case", [Case(pp=2), Case(dp=2, ep=2, model_kind="experts")], ids=str)
def test_training_goes_on_bit_for_bit_as_if_nobody_had_asked(case):
    undisturbed, asked = (run_distributed(curve, case.world_size, case, asks) for asks in (False, True))
    assert asked == undisturbed


def fail_in_the_middle(rank):
    initialize_communication()
    live = LiveModel(build_trainer(rank, Case(dp=2)))

    def action(ask):
        ask(IDS, None)
        raise ValueError("no such task")

    try:
        live.lead(action)
    except ValueError as error:
        return str(error)
    return "followed"


def fail_in_a_forward(rank):
    import megalite.training.live_model as module

    initialize_communication()
    told = []
    module._tell = lambda question=None: told.append(question is not None)
    live = LiveModel(build_trainer(rank, Case()))
    live._answer = lambda ids, starts: 1 / 0
    with pytest.raises(ZeroDivisionError):
        live.lead(lambda ask: ask(IDS, None))
    return told


def test_after_an_error_within_a_forward_nothing_more_is_told():
    """The other ranks wait inside that forward: a message would meet another collective of theirs."""
    assert run_distributed(fail_in_a_forward, 1) == [[True]]


def test_an_error_on_rank_0_leaves_no_rank_waiting():
    assert run_distributed(fail_in_the_middle, 2) == ["no such task", "followed"]
