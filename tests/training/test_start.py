"""A run that begins with a Hugging Face folder imports it once."""

import pytest
import torch

from megalite.checkpoint.load import TensorReader
from megalite.config.checkpoint import CheckpointConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from megalite.training.world import JobError
from tests.checkpoint.llamas import random_llama
from tests.harness import run_distributed
from tests.reference import mean_loss
from tests.trainers import (
    MODEL,
    Case,
    build_trainer,
    deepspeed_config,
    global_batch,
    micro_batches,
    run_config,
)

CASE = Case(tp=2, zero=1)
STEP = 9


def start(rank, folder, source) -> tuple[list[str], float]:
    """What is said, and the loss before any step."""
    said: list[str] = []
    run = run_config(CASE, output_dir=str(folder), checkpoint=CheckpointConfig(start_from=str(source)))
    trainer = build_trainer(rank, CASE)
    assert Checkpoints(run, deepspeed_config(CASE), rank, said.append).resume(trainer.engine) == 0
    return said, trainer.evaluate(micro_batches(STEP, trainer.context, CASE)).mean


def start_many_times(rank, folder, source, other, wrong):
    initialize_communication()
    first = start(rank, folder, source)
    if rank == 0:
        (source / "model.safetensors").unlink()
    again = start(rank, folder, source)
    errors = []
    for place, from_where in ((folder, other), (folder.parent / "second", wrong)):
        with pytest.raises(JobError) as caught:
            start(rank, place, from_where)
        errors.append(str(caught.value))
    return first, again, errors


def test_a_hugging_face_folder_is_imported_once_for_all_ranks(tmp_path):
    llama = random_llama(MODEL)
    source, other, wrong, run = (tmp_path / name for name in ("hf", "other", "wrong", "run"))
    llama.save_pretrained(source)
    llama.save_pretrained(other)
    wrong.mkdir()
    (wrong / "config.json").write_text("{}")
    results = run_distributed(start_many_times, CASE.world_size, run, source, other, wrong)
    with torch.no_grad():
        expected = mean_loss(llama, global_batch(STEP)).item()
    for (_, loss), (said_again, loss_again), errors in results:
        assert loss == loss_again == pytest.approx(expected, rel=1e-5)
        assert said_again[-1].startswith(f"starts from the weights of {run / 'start' / 'step-00000000'}")
        assert f"{run / 'start'} was made of {source} and checkpoint.start_from is {other}" in errors[0]
        assert "is of architecture none" in errors[1] or "has no weights" in errors[1]
        assert not any("\n" in error for error in errors)
    assert results[0][0][0][0] == f"imports {source} into {run / 'start'}"
    assert not any("imports" in line for line in results[0][1][0])
    reader = TensorReader(run / "start" / "step-00000000")
    assert reader.read("weight", "lm_head.weight").equal(llama.lm_head.weight)
