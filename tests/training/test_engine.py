"""What the engine refuses before anything is built, what it keeps of buffers, and what it does not reduce."""

from dataclasses import replace

import pytest
import torch

from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import register_state, spec_of, state_buffers, whole_spec
from megalite.training.engine import (
    EngineError,
    _restore_buffers,
    check_version,
    initialize_communication,
)
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches


def test_buffers_that_are_state_outlive_a_cast_and_a_move_in_fp32_and_with_their_specs():
    """A move to a GPU makes new tensors, which carry no spec; a cast does here what the move does there."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    spec = whole_spec(ParallelContext(), "bias_sum", (2,), is_summed=False)
    register_state(module[0], "bias_sum", spec, 1 / 3)
    state = {name: buffer for name, buffer in module.named_buffers() if hasattr(buffer, "spec")}
    module.bfloat16()
    assert not state_buffers(module)
    _restore_buffers(module, state, torch.device("cpu"))
    (buffer,) = state_buffers(module)
    assert buffer is module[0].bias_sum and spec_of(buffer).name == "bias_sum"
    assert buffer.dtype == torch.float32 and buffer[0] == torch.tensor(1 / 3)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.9", "0.19.8+cpu", "0.19.12"])
def test_a_version_whose_inside_was_read_is_taken(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.19.7", "0.18.9", "0.20.0", "1.0.0"])
def test_any_other_version_is_refused_in_one_line_with_both_numbers_and_the_remedy(version):
    with pytest.raises(EngineError) as refused:
        check_version(version)
    assert str(refused.value) == (
        f"DeepSpeed {version} is installed and megalite was tested with 0.19.8: "
        "pip install 'deepspeed~=0.19.8'"
    )


def gradients_of(rank: int, case: Case) -> dict:
    """How often gradients were put in one piece to be reduced; whether those stepped from fit bf16."""
    initialize_communication()
    trainer = build_trainer(rank, case)
    engine, pieces, fits = trainer.engine.engine, [], []
    reduce, step = engine.allreduce_bucket, engine.step

    def watched_reduce(*arguments, **options):
        pieces.append(1)
        return reduce(*arguments, **options)

    def watched_step():
        flat = getattr(trainer.engine.optimizer, "fp32_groups_gradients_flat", [])
        fits.extend(bool((gradient == gradient.bfloat16()).all()) for gradient in flat)
        return step()

    engine.allreduce_bucket, engine.step = watched_reduce, watched_step
    trainer.train_step(micro_batches(0, trainer.context), ADAM.learning_rate)
    return {"pieces": len(pieces), "fits": fits}


@pytest.mark.parametrize("case", [Case(zero=0), Case(zero=1, precision="bf16")], ids=str)
def test_gradients_of_one_rank_are_stepped_from_as_they_were_summed(case):
    """Control: those of two are reduced in bf16, DeepSpeed's default of communication_data_type."""
    [alone] = run_distributed(gradients_of, 1, case)
    together = run_distributed(gradients_of, 2, replace(case, dp=2))
    assert alone["pieces"] == 0 and all(rank["pieces"] for rank in together)
    if case.precision == "bf16":
        assert alone["fits"] and not any(alone["fits"])
        assert all(all(rank["fits"]) for rank in together)
