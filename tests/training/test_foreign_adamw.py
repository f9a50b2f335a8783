"""AdamW by a kernel of others in whole engines: ZeRO hands it other tensors at each stage, in other calls.

The kernel is a stand-in that computes by the formula, see tests/foreign_kernels.py.
"""

import pytest
import torch

from megalite.kernels.adamw import update_by_apex
from megalite.kernels.choice import Kernels
from megalite.training.checkpoints import live_pieces
from megalite.training.engine import initialize_communication
from tests.foreign_kernels import stand_in_for_apexs_adam
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

NUM_STEPS = 2
CASES = [  # experts over ranks give ZeRO-3 two tensors of a group, each with a call of its own
    Case(dp=2, zero=0),
    Case(dp=2, zero=2),
    Case(dp=2, ep=2, zero=3, model_kind="experts"),
    Case(dp=2, zero=1, precision="bf16"),
]


def train(rank, case, kernels):
    """Losses, and what a checkpoint would have of this rank."""
    initialize_communication()
    trainer = build_trainer(rank, case, kernels=kernels)
    steps = range(1, NUM_STEPS + 1)
    batches = [micro_batches(step, trainer.context, case) for step in steps]
    losses = [trainer.train_step(batch, ADAM.learning_rate).loss for batch in batches]
    live = [p for p in live_pieces(trainer.engine) if p.tensor.dtype == torch.float32]  # no rounded copies
    pieces = {(piece.name, piece.kind): piece.tensor.clone() for piece in live}
    recipe, masters = trainer.engine.recipe, trainer.engine.masters()
    inner = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer)
    counts = {recipe.steps_of(inner.state[part.flat]) for part in masters}
    return losses, pieces, counts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_what_is_saved_are_those_of_torch(case, monkeypatch):
    stand_in_for_apexs_adam(monkeypatch)
    ours = run_distributed(train, case.world_size, case, Kernels(adamw=update_by_apex))
    theirs = run_distributed(train, case.world_size, case, Kernels())
    for (losses, pieces, counts), (their_losses, their_pieces, their_counts) in zip(
        ours, theirs, strict=True
    ):
        assert losses == pytest.approx(their_losses, rel=1e-6)
        assert counts == their_counts == {NUM_STEPS}
        assert pieces.keys() == their_pieces.keys()
        for key, piece in pieces.items():
            torch.testing.assert_close(piece, their_pieces[key], rtol=1e-5, atol=1e-6)
