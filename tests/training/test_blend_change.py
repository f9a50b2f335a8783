"""A run that goes on with another blend is the run that is handed those samples, one after another."""

import json
import random

import pytest
import torch

from megalite.batch import Batch
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.data import DataConfig
from megalite.config.logging import LoggingConfig
from megalite.config.schedule import ScheduleConfig
from megalite.data.indexed_writer import IndexedDatasetWriter
from megalite.training.engine import initialize_communication
from megalite.training.lr_schedule import learning_rate_at
from megalite.training.trainer import StageTrainer, build_context
from tests.data.test_past import SEED as DATA_SEED
from tests.data.test_past import SEQ_LENGTH, read_blend
from tests.harness import run_distributed
from tests.jobs_in_world import run_job
from tests.trainers import MODEL, Case, deepspeed_config, run_config

# blend, the step it ends with, samples of each batch, data-parallel ranks, ZeRO stage
LIVES = [
    ([0.7, "a", 0.3, "b"], 3, 8, 1, 1),
    ([0.5, "a", 0.2, "b", 0.3, "c"], 6, 8, 2, 3),
    ([0.6, "c", 0.4, "b"], 9, 4, 2, 2),
]
NUM_STEPS = LIVES[-1][1]
ONE = Case(zero=1)


@pytest.fixture
def files(tmp_path):
    """Few and short documents: the first file is read more than once."""
    draw, files = random.Random(2), {}
    for name, count in (("a", 6), ("b", 30), ("c", 30)):
        documents = [
            [draw.randrange(MODEL.vocab_size) for _ in range(draw.randint(1, 9))] for _ in range(count)
        ]
        with IndexedDatasetWriter(tmp_path / name) as writer:
            for document in documents:
                writer.add_document([torch.tensor(document).numpy()])
        files[name] = str(tmp_path / name), documents
    return files


def config_of(case, folder, train, num_steps, size):
    """num_steps: after which this life ends; the learning rate does not know of it."""
    run = run_config(
        case,
        seed=DATA_SEED,
        output_dir=str(folder),
        data=DataConfig(train=train, seq_length=SEQ_LENGTH, split="1,0,0"),
        schedule=ScheduleConfig(num_steps=num_steps, warmup_steps=2, decay="constant"),
        checkpoint=CheckpointConfig(save_every_steps=0),
        logging=LoggingConfig(validate_every_steps=0, tensorboard=False),
    )
    deepspeed = deepspeed_config(case)
    sizes = {"train_batch_size": size, "train_micro_batch_size_per_gpu": 2}
    return run, deepspeed.model_copy(update=sizes | {"raw": deepspeed.raw | sizes})


def live(rank, case, *life):
    initialize_communication()
    run_job(rank, *config_of(case, *life))


def handed(rank, folder, batches):
    """Losses and norms of a run that is given its samples."""
    initialize_communication()
    run, deepspeed = config_of(ONE, folder, None, NUM_STEPS, 8)
    trainer = StageTrainer(run, deepspeed, build_context(run, rank, 1, torch.device("cpu")))
    curve = []
    for step, rows in enumerate(batches, 1):
        ids = torch.tensor(rows)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        result = trainer.train_step(batch.split(4), learning_rate_at(step, run.schedule, run.optimizer))
        curve.append((result.loss, result.grad_norm))
    return curve


def test_a_run_of_three_blends_is_the_run_that_is_handed_their_samples(files, tmp_path):
    folder, readers, batches, first = tmp_path / "run", {}, [], 1
    for items, last, size, dp, zero in LIVES:
        count = (last - first + 1) * size
        # of each life only its own steps are foreseen: the next one comes to need further epochs
        rows = read_blend(files, readers, items, count, count)
        batches += [rows[i : i + size] for i in range(0, count, size)]
        train = [str(files[item][0]) if item in files else repr(item) for item in items]
        case = Case(dp=dp, zero=zero)
        run_distributed(live, dp, case, folder, train, last, size)
        first = last + 1
    assert readers["a"].singles  # the first file has come to a further epoch

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = torch.tensor([(row["loss"], row["grad_norm"]) for row in rows], dtype=torch.float64)
    (curve,) = run_distributed(handed, 1, folder, batches)
    # fp32 sums over other layouts and in another order, over nine steps
    torch.testing.assert_close(found, torch.tensor(curve, dtype=torch.float64), rtol=1e-4, atol=0)

    begun_again = list(batches)
    begun_again[3:6] = [batches[0], *batches[3:5]]
    (other,) = run_distributed(handed, 1, folder, begun_again)
    assert abs(other[3][0] / curve[3][0] - 1) > 1e-3  # other samples would be seen
