"""Sums that begin with the first gradient step as those that begin with zeros, bit for bit."""

from functools import cache
from unittest.mock import patch

import pytest
import torch

from megalite.training import engine
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer
from tests.harness import run_distributed
from tests.trainers import Case, build_trainer, micro_batches

CASES = {
    "one rank's": Case(dp=2, zero=1, precision="bf16"),
    "stages": Case(pp=2, zero=1, precision="bf16", tied=True),
    "fp32": Case(dp=2, zero=1),  # has no such sums
}
NUM_STEPS, REFUSED, UNREACHED = 5, 1, 3
SHIPPED = {"begin_with_the_first": lambda optimizer: None, "clear_unreached": lambda optimizer: None}


def body(rank: int) -> dict[str, dict]:
    initialize_communication()
    found = {}
    for name, case in CASES.items():
        ours = steps_of(build_trainer(rank, case), case)
        with patch.multiple(engine, **SHIPPED):
            theirs = steps_of(build_trainer(rank, case), case, marks=True)
        with patch.object(engine, "clear_unreached", SHIPPED["clear_unreached"]):
            stale = steps_of(build_trainer(rank, case), case)
        found[name] = {"ours": ours, "theirs": theirs, "stale": stale}
    return found


def steps_of(trainer: StageTrainer, case: Case, *, marks: bool = False) -> dict:
    """Losses, norms and masters: one step is not taken, one does not reach rank 0's first parameter.

    marks: that it counts as reached by zeros, as it is to the other rank.
    """
    optimizer, told, reaches_all = trainer.engine.optimizer, [], True
    update = getattr(optimizer, "_update_hp_grad", None)

    def update_if_reached(lp, group, index, clear_lp_grads):
        if reaches_all or (group, index) != (0, 0):
            update(lp, group, index, clear_lp_grads)
        elif marks:
            optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = update_if_reached
    for step in range(NUM_STEPS):
        reaches_all = step != UNREACHED or trainer.context.rank > 0
        objection = (lambda loss, norm: "no") if step == REFUSED else None
        result = trainer.train_step(micro_batches(step, trainer.context, case), 1e-2, objection)
        told.append((result.loss, result.grad_norm, result.is_taken))
    return {"told": told, "masters": [part.view(part.flat).clone() for part in trainer.engine.masters()]}


@cache
def results() -> list[dict]:
    return run_distributed(body, 2, timeout_seconds=300)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_same(name):
    for rank in results():
        ours, theirs = rank[name]["ours"], rank[name]["theirs"]
        assert ours["told"] == theirs["told"] and len(set(ours["told"])) == NUM_STEPS
        assert all(map(torch.equal, ours["masters"], theirs["masters"]))


@pytest.mark.parametrize("name", ["one rank's", "stages"])
def test_a_parameter_that_no_backward_reached_is_not_stepped_by_the_step_before(name):
    """A control: it would be, if its sum were not cleared."""
    pairs = [(rank[name]["ours"]["masters"], rank[name]["stale"]["masters"]) for rank in results()]
    assert not all(torch.equal(*both) for pair in pairs for both in zip(*pair, strict=True))
