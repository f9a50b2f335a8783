"""The samples that a run reads: which files, how many samples, and where their indices are kept."""

from collections.abc import Iterator

from megalite.config.run import RunConfig
from megalite.data.cache import IndexCache
from megalite.data.datasets import Datasets, build_datasets, cache_beside
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset


def open_cache(run: RunConfig) -> IndexCache:
    """The cache that the run names, or the one beside its data. Raises DataError when it names no data."""
    return IndexCache(run.data.cache_dir or cache_beside(_training_files(run)))


def build_samples(
    run: RunConfig, batch_samples: int, cache: IndexCache | None = None, progress: bool = False
) -> Datasets:
    """Training samples for all optimizer steps of `batch_samples`, and validation samples, if there are any.

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
        train_samples=steps * batch_samples,
        validation_samples=num_validations * per_validation,
        seed=run.seed,
        cache=cache,
        progress=progress,
    )


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
