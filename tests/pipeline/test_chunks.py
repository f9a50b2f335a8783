"""What several chunks of a model in one engine need of ZeRO-3.

That they are the run of one process is shown with all other layouts, in tests/test_equivalence.py.
"""

from megalite.training import engine as engine_module
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

NUM_STEPS = 3
CASE = Case(pp=2, schedule="interleaved")


def norms(rank: int, with_clearing: bool) -> list[float]:
    initialize_communication()
    if not with_clearing:
        engine_module.clear_gradients = lambda optimizer: None
    trainer = build_trainer(rank, CASE)
    steps = [micro_batches(step, trainer.context, CASE) for step in range(NUM_STEPS)]
    return [trainer.train_step(batches, ADAM.learning_rate).grad_norm for batches in steps]


def test_control_without_clearing_zero_3_adds_the_gradients_of_the_step_before():
    with_clearing, without = (run_distributed(norms, 2, cleared)[0] for cleared in (True, False))
    assert with_clearing[0] == without[0]
    # Rounding parts such norms by 1e-6. What is added was clipped, and concerns one chunk of each rank only.
    assert min(abs(b / a - 1) for a, b in zip(with_clearing[1:], without[1:], strict=True)) > 1e-3
