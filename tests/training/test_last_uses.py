"""What ZeRO-3 lets go of within a step: DeepSpeed's answer, which walks the rest of it for each module."""

from unittest.mock import patch

import pytest
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from megalite.training.engine import initialize_communication
from megalite.training.last_uses import OWN_NAME, LastUses
from tests.harness import run_distributed
from tests.trainers import Case, build_trainer, micro_batches

ASKED = f"{OWN_NAME}__params_to_release"
SHIPPED = getattr(PartitionedParameterCoordinator, ASKED)
CASES = [
    Case(dp=2),
    Case(dp=2, tied=True, recompute="full"),
    Case(dp=2, ep=2, model_kind="experts"),
    Case(pp=2, schedule="zbv", tied=True),
]


def answers(rank: int, cases: list[Case]) -> list[list[tuple[set[int], set[int]]]]:
    """Ours and DeepSpeed's for each place of a step, before and after a validation, small ones among them."""
    initialize_communication()
    return [
        answers_of(build_trainer(rank, case, stage3_param_persistence_threshold=0), case) for case in cases
    ]


def answers_of(trainer, case):
    coordinator = trainer.engine.optimizer.parameter_offload.get_param_coordinator()
    found = []
    for _ in range(2):
        for step in range(2):  # the first records the trace
            trainer.train_step(micro_batches(step, trainer.context, case), 1e-3)
        trainer.engine.begin_pass()
        trace = getattr(coordinator, f"{OWN_NAME}__submodule_order")
        assert isinstance(trace, tuple) and len(trace) > 20
        found += [
            (getattr(coordinator, ASKED)(module, place + 1), SHIPPED(coordinator, module, place + 1))
            for place, module in enumerate(trace)
        ]
        trainer.evaluate(micro_batches(0, trainer.context, case))
    return found


def test_it_is_what_deepspeed_answers():
    for of_rank in run_distributed(answers, 2, CASES):
        for of_case in of_rank:
            assert all(ours == theirs for ours, theirs in of_case)
            assert any(ours for ours, _ in of_case) and not all(ours for ours, _ in of_case)


def steps_without(rank: int, case: Case, own: bool) -> str:
    initialize_communication()
    answer = LastUses.answer if own else lambda uses: None
    with patch.object(LastUses, "answer", answer), patch.object(PartitionedParameterCoordinator, ASKED, walk):
        trainer = build_trainer(rank, case)
        try:
            for step in range(3):
                trainer.train_step(micro_batches(step, trainer.context, case), 1e-3)
        except WalkError:
            return "walked"
    return "looked up"


class WalkError(Exception):
    pass


def walk(*args):
    raise WalkError


@pytest.mark.parametrize(("own", "want"), [(True, "looked up"), (False, "walked")])
def test_nothing_walks_the_rest_of_a_step(own, want):
    assert run_distributed(steps_without, 1, Case(), own) == [want]
