"""A run's samples: how many, from where; and a checkpoint trained on other data is refused."""

import json

import numpy as np
import pytest

from megalite.config.run import DataConfig, LoggingConfig, RunConfig, ScheduleConfig
from megalite.data.error import DataError
from megalite.data.fingerprint import describe_data
from megalite.data.indexed_writer import IndexedDatasetWriter
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from megalite.training.samples import build_samples, open_cache, token_files
from tests.harness import run_distributed
from tests.trainers import Case, build_trainer, deepspeed_config, run_config


@pytest.fixture
def prefixes(tmp_path):
    random = np.random.default_rng(0)
    for name in "abc":
        with IndexedDatasetWriter(tmp_path / name) as writer:
            writer.add_documents(random.integers(0, 90, 600), np.full(60, 10))
    return [str(tmp_path / name) for name in "abc"]


def run_on(train, seed=1, **data):
    schedule = ScheduleConfig(num_steps=10, warmup_steps=1)
    logging = LoggingConfig(validate_every_steps=4, validation_steps=2)
    data = DataConfig(train=train, seq_length=8, split="8,2,0", **data)
    return RunConfig(data=data, schedule=schedule, logging=logging, seed=seed)


def test_there_are_samples_for_all_steps_and_validations(prefixes):
    datasets = build_samples(run_on([0.5, prefixes[0], 0.5, prefixes[1]]), batch_samples=6)
    assert len(datasets.train) == 60 and len(datasets.validation) == (10 // 4 + 1) * 2 * 6
    assert datasets.test is None


def test_each_file_is_named_once(prefixes):
    datasets = build_samples(run_on([prefixes[0], prefixes[1], prefixes[0]]), batch_samples=2)
    assert [indexed.prefix for indexed in token_files(datasets)] == prefixes[:2]
    apart = build_samples(run_on(prefixes[:1], validation=prefixes[2:]), batch_samples=2)
    assert [indexed.prefix for indexed in token_files(apart)] == [prefixes[0], prefixes[2]]


def test_the_cache_is_beside_the_first_file_unless_it_is_named(prefixes, tmp_path):
    assert open_cache(run_on(["2", prefixes[0], "1", prefixes[1]])).folder == tmp_path / "cache"
    assert open_cache(run_on(prefixes, cache_dir=str(tmp_path / "named"))).folder == tmp_path / "named"


def test_a_run_without_data_has_nothing_to_index():
    with pytest.raises(DataError, match=r"data\.train is null.*: name a prefix"):
        open_cache(RunConfig())


def save_and_resume(rank, folder, train):
    """What resuming gives with the same data, with another order, and with another order that is allowed."""
    initialize_communication()
    trainer = build_trainer(rank, Case())

    def checkpoints(seed, allow):
        run = run_on(train, seed, allow_other_data=allow)
        config = run_config(Case(), output_dir=str(folder)).model_copy(update={"data": run.data})
        data = describe_data(build_samples(run, 2))
        return Checkpoints(config, deepspeed_config(Case()), rank, lambda text: None, data)

    checkpoints(1, False).save(trainer.engine, 1)
    same = checkpoints(1, False).resume(trainer.engine)
    with pytest.raises(DataError) as refusal:
        checkpoints(2, False).resume(trainer.engine)
    return same, str(refusal.value), checkpoints(2, True).resume(trainer.engine)


def test_a_checkpoint_of_other_data_is_refused_unless_told_otherwise(prefixes, tmp_path):
    same, refusal, allowed = run_distributed(save_and_resume, 1, tmp_path / "run", prefixes[:1])[0]
    assert same == allowed == 1
    assert "this is not the data of" in refusal and "seed: expected 1, found 2" in refusal
    assert "\n" not in refusal and "step-00000001" in refusal
    [state] = (tmp_path / "run").glob("checkpoints/step-*/state.json")
    [recorded] = json.loads(state.read_text())["data"]["train"]
    assert recorded["prefix"] == prefixes[0] and len(recorded["idx_sha256"]) == 64
