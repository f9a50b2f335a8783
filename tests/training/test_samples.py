"""A run's samples: how many, from where; and a checkpoint trained on other data is refused."""

import numpy as np
import pytest

from megalite.config.checkpoint import CheckpointConfig
from megalite.config.data import DataConfig
from megalite.config.logging import LoggingConfig
from megalite.config.run import RunConfig
from megalite.config.schedule import ScheduleConfig
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import IndexedDatasetWriter
from megalite.training.checkpoints import Checkpoints, find_newest
from megalite.training.data import open_data
from megalite.training.engine import initialize_communication
from megalite.training.samples import build_samples, open_cache, token_files
from tests.harness import run_distributed
from tests.trainers import BATCH, Case, build_trainer, deepspeed_config, run_config


@pytest.fixture
def prefixes(tmp_path):
    random = np.random.default_rng(0)
    for name in "abc":
        with IndexedDatasetWriter(tmp_path / name) as writer:
            writer.add_documents(random.integers(0, 90, 600), np.full(60, 10))
    return [str(tmp_path / name) for name in "abc"]


def run_on(train, seed=1, split="8,2,0", **data):
    schedule = ScheduleConfig(num_steps=10, warmup_steps=1)
    logging = LoggingConfig(validate_every_steps=4, validation_steps=2)
    data = DataConfig(train=train, seq_length=8, split=split, **data)
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


def save_and_reopen(rank, folder, train):
    """A checkpoint of a run on `train`; then per change of the run what it reads, is told, or refused."""
    initialize_communication()
    trainer = build_trainer(rank, Case())
    config = deepspeed_config(Case())

    def opened(train, seed=1, keep_best=0, **changes):
        data = run_on(train, seed, **changes).data
        checkpoint = CheckpointConfig(save_every_steps=4, keep_best=keep_best)
        facts = {"output_dir": str(folder), "data": data, "seed": seed, "checkpoint": checkpoint}
        run = run_config(Case(), logging=LoggingConfig(validate_every_steps=4), **facts)
        lines = []
        newest = find_newest(run, rank, lines.append)
        try:
            _, found = open_data(run, config, trainer.context, 20 * BATCH, newest, lines.append)
        except DataError as error:
            return str(error)
        if newest.folder is None:
            Checkpoints(run, config, rank, print, found.description).save(trainer.engine, 1)
        return lines, found.train.loader.dataset

    a, b, c = train
    assert opened([a, b])[0] == []
    return {
        "same": opened([a, b]),
        "seed": opened([a, b], seed=2),
        "allowed": opened([a, b], seed=2, allow_other_data=True),
        "blend": opened([0.5, c, 0.5, a]),
        "best": opened([0.5, c, 0.5, a], keep_best=1),
        "changed back": opened([a, b]),
    }


def test_a_run_goes_on_with_what_it_has_read_or_is_told_why_not(prefixes, tmp_path):
    a, b, c = prefixes
    found = run_distributed(save_and_reopen, 1, tmp_path / "run", prefixes)[0]
    step = tmp_path / "run/checkpoints/step-00000001"
    for name in ("same", "allowed", "changed back"):
        assert found[name][0] == [] and found[name][1].before.read == (0, 0)
    assert found["seed"] == (
        f"this is not the data of {step}: train dataset 1 of 2 ({a}): seed: expected 1, found 2: keep seed, "
        "or set data.allow_other_data=true"
    )
    lines, train = found["blend"]
    assert train.before.read == (0, BATCH // 2)
    assert lines == [
        f"another blend of data.train after {BATCH} samples: {c} begins, {a} goes on after {BATCH // 2}, "
        f"{b} has ended after {BATCH // 2}",
        f"validation losses are of other data than before {step}: validation dataset 1 of 2 ({c}): "
        f"ids_sha256: {different(a, c)}",
    ]
    assert found["best"].startswith("checkpoint.keep_best 1 compares validation losses, and the validation ")
    assert found["best"].endswith("name those, or set checkpoint.keep_best=0")


def different(*prefixes):
    hashes = [IndexedDataset(prefix).ids_sha256 for prefix in prefixes]
    return "expected {}, found {}".format(*hashes)
