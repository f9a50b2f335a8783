"""The samples that a run reads: which files, how many, which are this rank's, and where indices are kept."""

from collections.abc import Iterator
from typing import Any

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.cache import IndexCache
from megalite.data.datasets import Datasets, build_datasets, cache_beside
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.past import Past
from megalite.parallel.context import ParallelContext


def open_cache(run: RunConfig) -> IndexCache:
    """The cache that the run names, or the one beside its data. Raises DataError when it names no data."""
    return IndexCache(run.data.cache_dir or cache_beside(_training_files(run)))


def build_samples(
    run: RunConfig,
    batch_samples: int,
    cache: IndexCache | None = None,
    progress: bool = False,
    train_samples: int | None = None,
    past: Past | None = None,
) -> Datasets:
    """Training samples for all optimizer steps of `batch_samples`, and validation samples, if there are any.

    train_samples: another number of the former, of a run whose batches were not all alike.
    past: what a run that goes on has read.

    Raises DataError when the run names no data, or data that cannot serve.
    """
    data, every, steps = run.data, run.logging.validate_every_steps, run.schedule.num_steps
    per_validation = run.logging.validation_steps * batch_samples
    num_validations = steps // every + 1 if every else 0  # as Megatron counts them
    return build_datasets(
        _training_files(run),
        data.validation,
        split=data.split,
        seq_length=data.seq_length,
        train_samples=steps * batch_samples if train_samples is None else train_samples,
        validation_samples=num_validations * per_validation,
        seed=run.seed,
        cache=cache,
        progress=progress,
        past=past,
    )


def slices_of(run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext) -> dict[str, Any]:
    """How a loader cuts each global batch for this rank: the arguments of `SampleLoader`."""
    stages, data = context["pp"], context["dp"]
    return {
        "global_batch_samples": deepspeed.train_batch_size,
        "num_micro_batches": deepspeed.num_micro_batches(data.size),
        "dp_rank": data.rank,
        "dp_size": data.size,
        "vocab_size": run.model.vocab_size,
        "reads_tokens": stages.rank in (0, stages.size - 1),
    }


def token_files(datasets: Datasets) -> Iterator[IndexedDataset]:
    """Each file behind the samples, once."""
    seen = set()
    for dataset in datasets:
        for indexed in dataset.indexed_datasets if dataset else ():
            if indexed.prefix not in seen:
                seen.add(indexed.prefix)
                yield indexed


def _training_files(run: RunConfig) -> list[str]:
    if run.data.train is None:
        raise DataError(
            "data.train is null: the run makes its data itself when it starts: name a prefix instead"
        )
    return run.data.train
