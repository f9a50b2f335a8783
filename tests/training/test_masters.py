"""One copy of masters and gradients steps bit for bit as DeepSpeed's two do, and there is one."""

from functools import cache
from unittest.mock import patch

import pytest
import torch

from megalite.config.optimizer import OptimizerConfig
from megalite.training import engine
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer
from megalite.training.zero import inner_optimizer, local_weight
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

MUON = OptimizerConfig(name="muon", learning_rate=3e-3)
CASES = [
    *((Case(dp=2, zero=zero), ADAM) for zero in (1, 2, 3)),
    *((Case(pp=2, zero=zero, tied=True), ADAM) for zero in (1, 3)),
    (Case(dp=2, zero=3, ep=2, model_kind="experts"), ADAM),
    (Case(dp=2, zero=3, gathering="micro_batch", precision="bf16"), ADAM),
    *((Case(dp=2, zero=zero), MUON) for zero in (2, 3)),
]
NUM_STEPS, REFUSED = 4, 2
SHARE, UPDATE = "share_masters", "update_from_partitions"


def body(rank: int) -> list[dict]:
    initialize_communication()
    results = []
    for case, optimizer in CASES:
        ours = numbers_of(build_trainer(rank, case, optimizer), case)
        with patch.object(engine, SHARE, lambda *_: None), patch.object(engine, UPDATE, lambda *_: None):
            theirs = numbers_of(build_trainer(rank, case, optimizer), case)
        results.append({"ours": ours, "theirs": theirs})
    return results


def numbers_of(trainer: StageTrainer, case: Case) -> dict:
    """Losses, norms and weights along a few steps, one of them not taken; bytes of weights and masters."""
    told, optimizer = [], trainer.engine.optimizer
    for step in range(NUM_STEPS):
        objection = (lambda loss, norm: "no") if step == REFUSED else None
        result = trainer.train_step(micro_batches(step, trainer.context, case), 1e-2, objection)
        told.append((result.loss, result.grad_norm, result.is_taken))
    parts = list(trainer.engine.masters())
    weights = [local_weight(optimizer, p.parameter, 0)[1] for p in parts]
    mappings = [getattr(p.parameter, "_hp_mapping", None) for p in parts]
    fragments = [mapping.hp_fragment for mapping in mappings if mapping is not None]  # DeepSpeed's own views
    held = [*weights, *inner_optimizer(optimizer).state, *fragments]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    copies = [weight.clone() for weight in weights] + [p.view(p.flat).clone() for p in parts]
    return {"told": told, "tensors": copies, "held_bytes": sum(storages.values())}


@cache
def results() -> list[dict]:
    return run_distributed(body, 2, timeout_seconds=300)[1]


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda i: f"{CASES[i][0]},{CASES[i][1].name}")
def test_one_copy_steps_as_two_do(place):
    ours, theirs = (results()[place][name] for name in ("ours", "theirs"))
    assert ours["told"] == theirs["told"]
    assert [is_taken for _, _, is_taken in ours["told"]] == [step != REFUSED for step in range(NUM_STEPS)]
    assert all(map(torch.equal, ours["tensors"], theirs["tensors"]))


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda i: f"{CASES[i][0]},{CASES[i][1].name}")
def test_masters_of_fp32_weights_take_no_memory(place):
    case, result = CASES[place][0], results()[place]
    ours, theirs = (result[name]["held_bytes"] for name in ("ours", "theirs"))
    assert (ours < theirs) == (case.precision == "fp32")
