"""Samples at random from 100 million tokens in documents of 50 to 2,000, as tensors of inputs and labels; and
the time from imports to the first batch, on a billion tokens (a sparse file) whose index is cached. megalite
checks both files, the cached index and the first 64 Mi ids before that batch; megatron-core does not.
"""

import importlib
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measurement import Measurement, in_fresh_process, median_seconds
from benchmarks.token_files import random_lengths, write_random, write_sparse
from megalite.config.data import DataConfig
from megalite.config.logging import LoggingConfig
from megalite.config.run import RunConfig
from megalite.config.schedule import ScheduleConfig
from megalite.data.gpt_dataset import GPTDataset
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.loader import BatchLoader, check_vocabulary
from megalite.training.samples import build_samples, open_cache, token_files

TITLE = "Data: reading samples"
PEER = "megatron-core"
SEQ_LENGTH, SEED, BATCH, STEPS = 1024, 1234, 32, 25_000
DRAWS, ROUNDS, FIRST_ROUNDS = 5_000, 7, 3


def measure() -> list[Measurement]:
    """Samples per second, and seconds to the first batch."""
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "random"), Path(folder, "sparse")
        write_random(small, random_lengths(97_600))
        write_sparse(large, random_lengths(976_000))
        rates = samples_per_second(small)
        cases = [(cached, name) for cached in (False, True) for name in FIRST_BATCH]
        seconds: dict[tuple[bool, str], list[float]] = {case: [] for case in cases}
        for cached, name in cases * FIRST_ROUNDS:
            if not cached:
                shutil.rmtree(large.parent / CACHES[name], ignore_errors=True)
            seconds[cached, name].append(in_fresh_process(first_batch, name, large))
    measurements = [Measurement("random samples", "1/s", rates["megalite"], rates["megatron"])]
    for cached, title in ((True, "first batch, index cached"), (False, "first batch, no index yet")):
        ours, theirs = (median(seconds[cached, name]) for name in ("megalite", "megatron"))
        measurements.append(Measurement(title, "s", ours, theirs, higher_is_better=False))
    return measurements


def samples_per_second(prefix: Path) -> dict[str, float]:
    """Both read the same positions, in turns."""
    ours, theirs = GPTDataset(IndexedDataset(prefix), SEQ_LENGTH, None, SEED), megatron_dataset(prefix, None)
    positions = np.random.default_rng(2).integers(0, len(ours), DRAWS).tolist()

    def read_ours(position: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = torch.from_numpy(ours[position])
        return sample[:-1].contiguous(), sample[1:].contiguous()

    def read_theirs(position: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = theirs[position]
        return sample["tokens"], sample["labels"]

    for position in positions[:100]:
        if not all(
            torch.equal(a, b) for a, b in zip(read_ours(position), read_theirs(position), strict=True)
        ):
            raise RuntimeError("the two samples differ")
    bodies = {
        "megalite": lambda: [read_ours(position) for position in positions],
        "megatron": lambda: [read_theirs(position) for position in positions],
    }
    return {name: DRAWS / seconds for name, seconds in median_seconds(bodies, ROUNDS).items()}


def first_batch(name: str, prefix: Path) -> float:
    """Seconds from opened imports to a batch; runs in a process of its own."""
    if name == "megatron":
        warnings.simplefilter("ignore")
        importlib.import_module("megatron.core.datasets.helpers")
    started = time.perf_counter()
    FIRST_BATCH[name](prefix)
    return time.perf_counter() - started


def megalite_first_batch(prefix: Path) -> Any:
    """What a training job does."""
    run = RunConfig(
        data=DataConfig(train=[str(prefix)], seq_length=SEQ_LENGTH, split="1,0,0"),
        logging=LoggingConfig(validate_every_steps=0),
        schedule=ScheduleConfig(num_steps=STEPS),
        seed=SEED,
    )
    datasets = build_samples(run, BATCH, open_cache(run))
    for indexed in token_files(datasets):
        check_vocabulary(indexed, run.model.vocab_size)
    assert datasets.train is not None
    loader = BatchLoader(
        datasets.train,
        global_batch_samples=BATCH,
        num_micro_batches=1,
        dp_rank=0,
        dp_size=1,
        vocab_size=run.model.vocab_size,
    )
    return loader.batch(0)


def megatron_first_batch(prefix: Path) -> Any:
    """Its dataset, collated as its data loader does."""
    dataset = megatron_dataset(prefix, BATCH * STEPS)
    return torch.utils.data.default_collate([dataset[position] for position in range(BATCH)])


FIRST_BATCH = {"megalite": megalite_first_batch, "megatron": megatron_first_batch}
CACHES = {"megalite": "cache", "megatron": "sparse"}  # folders beside the files


class Vocabulary:
    """What megatron-core asks of a tokenizer."""

    vocab_size, eod, pad = 32_000, 0, -1
    unique_identifiers = {"class": "Vocabulary"}  # noqa: RUF012


def megatron_dataset(prefix: Path, num_samples: int | None) -> Any:
    """All of a file as one training dataset; its index is cached below the prefix."""
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset as MegatronDataset
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        tokenizer=Vocabulary(),
        blend=([str(prefix)], None),
        split="1",
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    sizes = [num_samples, 0, 0] if num_samples else [None, None, None]
    return BlendedMegatronDatasetBuilder(MegatronDataset, sizes, lambda: True, config).build()[0]
