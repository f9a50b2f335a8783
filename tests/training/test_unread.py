"""Backward under ZeRO-3 gathers no table that it does not read, and gives the numbers of one that does."""

from functools import cache
from unittest.mock import patch

import pytest
import torch

from megalite.config.tuning import LoraConfig
from megalite.parallel.shard import spec_of
from megalite.training import engine
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

TABLES = {"model.embed_tokens.weight", "lm_head.weight"}
CASES = {
    "untied": Case(dp=2, gathering="micro_batch"),
    "tied": Case(dp=2, gathering="micro_batch", tied=True),
    "gathered once": Case(dp=2, tied=True),
    "stages": Case(pp=2, tied=True, gathering="micro_batch", schedule="afab"),
    "both ends on a rank": Case(pp=2, tied=True, gathering="micro_batch", schedule="zbv"),
    "bf16": Case(dp=2, gathering="micro_batch", precision="bf16"),
}
NUM_STEPS = 3
ALWAYS = {"stage3_param_persistence_threshold": 0}  # else such small tables would never be let go of


def body(rank: int) -> dict[str, dict]:
    initialize_communication()
    found = {name: both(rank, case) for name, case in CASES.items()}
    found["adapters"] = both(rank, CASES["untied"], lora=LoraConfig(rank=2))
    with patch.object(engine.StageChunks, "forward", losses_apart):
        found["losses of tokens"] = both(rank, CASES["untied"])
    return found


def losses_apart(chunks, x, *, batch, chunk):
    """The same loss by way of each token's, which backward weighs."""
    for stage in chunks:
        stage.loss = lambda head, batch: head(labels=batch.labels.T, reduction="none").sum()
    return chunks[chunk](x, batch=batch)


def both(rank: int, case: Case, **sections) -> dict:
    ours = steps_of(build_trainer(rank, case, **sections, **ALWAYS), case)
    with patch.object(engine, "leave_unread_weights", lambda module: None):
        theirs = steps_of(build_trainer(rank, case, **sections, **ALWAYS), case)
    return {"ours": ours, "theirs": theirs}


def steps_of(trainer: StageTrainer, case: Case) -> dict:
    """Losses and norms, weights at the end, and which tables were asked for in backwards."""
    asked: set[str] = set()
    coordinator = trainer.engine.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def watched(module, forward):
        names = {spec_of(parameter).name for parameter in module.parameters(recurse=False)}
        asked.update(() if forward else names & TABLES)
        return fetch(module, forward)

    coordinator.fetch_sub_module = watched
    told = []
    for step in range(NUM_STEPS):
        result = trainer.train_step(micro_batches(step, trainer.context, case), ADAM.learning_rate)
        told.append((result.loss, result.grad_norm))
    weights = [part.view(part.flat).clone() for part in trainer.engine.masters()]
    left = [tuple(p.shape) for p in trainer.engine.module.parameters() if p.ds_status.name != "AVAILABLE"]
    return {"asked": asked, "told": told, "weights": weights, "left": left}


@cache
def results() -> list[dict]:
    return run_distributed(body, 2, timeout_seconds=300)


@pytest.mark.parametrize("name", [*CASES, "adapters", "losses of tokens"])
def test_numbers_are_those_of_a_backward_that_gathers_everything(name):
    for rank in results():
        ours, theirs = rank[name]["ours"], rank[name]["theirs"]
        assert ours["told"] == theirs["told"]
        assert all(map(torch.equal, ours["weights"], theirs["weights"]))
        assert len(set(ours["told"])) == NUM_STEPS


@pytest.mark.parametrize("name", [*CASES, "adapters"])
def test_no_table_is_gathered_for_a_backward(name):
    for rank in results():
        assert rank[name]["ours"]["asked"] == set()
    assert any(rank[name]["theirs"]["asked"] for rank in results()), "a control: else it is"


def test_a_head_whose_losses_stay_apart_is_gathered_and_the_embedding_is_not():
    for rank in results():
        assert rank["losses of tokens"]["ours"]["asked"] == {"lm_head.weight"}
        assert rank["losses of tokens"]["theirs"]["asked"] == TABLES


@pytest.mark.parametrize("name", CASES)
def test_what_stood_in_for_a_table_is_gone(name):
    for rank in results():
        assert set(rank[name]["ours"]["left"]) <= {(0,)}
