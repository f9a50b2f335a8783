"""A flipped bit on one rank is named; and what ranks hold copies of stays the same to the last bit."""

import pytest
import torch

from megalite.training.checkpoints import live_pieces
from megalite.training.copies import CopiesError, checksum
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
# layout -> a tensor of which ranks hold copies, its kind, the rank to be spoilt, and what is said
UP = "model.layers.1.mlp.up_proj.weight"
CASES = {
    Case(dp=4, zero=0): (
        "weight",
        "model.layers.1.mlp.up_proj.weight",
        2,
        "on rank 2 is not that of the other 3",
    ),
    Case(dp=4, zero=0, model_kind="experts"): ("exp_avg_sq", NORM, 0, "on rank 0 is not that of the other 3"),
    Case(cp=4, zero=0, way="ring"): ("weight", UP, 2, "on rank 2 is not that of the other 3"),
    Case(cp=2, dp=2, zero=2, model_kind="experts"): ("weight", NORM, 3, "on rank 3 is not that of the other"),
    Case(tp=4, zero=3): ("exp_avg", NORM, 3, "on rank 3 is not that of the other 3"),
    Case(tp=2, dp=2, zero=1): ("weight", NORM, 1, "on rank 1"),
    Case(tp=4, sp=False, zero=2): ("weight", "model.layers.0.self_attn.k_proj.weight", 1, "on ranks 0, 1"),
    Case(pp=2, zero=1, tied=True): ("weight", EMBEDDING, 1, "on ranks 0, 1"),
    Case(pp=2, dp=2, zero=2, tied=True): ("weight", EMBEDDING, 3, "on rank 3 is not that of the other 3"),
    Case(dp=2, zero=1, precision="bf16"): ("weight", "lm_head.weight", 1, "on ranks 0, 1"),
}


def train_and_spoil(rank, case, kind, name, victim):
    """Steps without a complaint; what is said after one bit was flipped on one rank."""
    initialize_communication()
    trainer = build_trainer(rank, case)
    for step in (1, 2, 3):
        trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
        trainer.copies.check(step)
    if rank == victim:
        spoilt = [p.tensor for p in live_pieces(trainer.engine) if (p.kind, p.name) == (kind, name)][-1]
        words = spoilt.detach().view(torch.int32 if spoilt.element_size() == 4 else torch.int16)
        words[-1] ^= 1 << 9
    try:
        trainer.copies.check(4)
    except CopiesError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_flipped_bit_is_named(case):
    kind, name, victim, said = CASES[case]
    for line in run_distributed(train_and_spoil, case.world_size, case, kind, name, victim):
        assert line.startswith(f"step 4: {kind} {name} ") and said in line, line


def test_each_bit_counts():
    tensor = torch.randn(50)
    before = checksum(tensor).item()
    for bit in range(32):
        tensor.view(torch.int32)[bit] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert checksum(tensor).item() != before
        tensor.view(torch.int32)[bit] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert checksum(tensor).item() == before
    assert checksum(tensor.bfloat16()).item() == tensor.bfloat16().view(torch.int16).long().sum().item()
