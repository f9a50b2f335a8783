"""Prefixes, weights and a split to the training, validation and test datasets of a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from megalite.data.blend import BlendedDataset, normalize, parse_blend, target_samples
from megalite.data.cache import IndexCache
from megalite.data.error import DataError
from megalite.data.gpt_dataset import SPLITS, GPTDataset, split_sequences
from megalite.data.indexed_dataset import IndexedDataset

SampleDataset = GPTDataset | BlendedDataset


class Datasets(NamedTuple):
    """What a run reads; a part of which no samples are wanted is None."""

    train: SampleDataset | None
    validation: SampleDataset | None
    test: SampleDataset | None


def build_datasets(
    train: Sequence[str],
    validation: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    *,
    split: str,
    seq_length: int,
    train_samples: int | None,
    validation_samples: int | None = 0,
    test_samples: int | None = 0,
    seed: int,
    cache: IndexCache | None = None,
    progress: bool = False,
) -> Datasets:
    """The datasets of a run, with at least as many samples as are wanted.

    Each list holds prefixes, or weight and prefix in turn. With `train` alone, all parts come from its
    sequences, cut by `split`; else each part has a list of its own, used whole, and `split` has no effect.
    The order of the samples is that of Megatron-core for `blend` and `split`, or for `blend_per_split`.

    Megatron's counts: train_samples = steps * global batch; validation_samples =
    (steps // validate_every + 1) * validation_steps * global batch. None stands for one epoch of every file,
    which leaves no room for weights.

    Raises DataError for files, weights or a split that cannot serve.
    """
    separate = validation is not None or test is not None
    lists = [train, validation, test] if separate else [train] * len(SPLITS)
    builder = _Builder(None if separate else split, seq_length, seed, cache, progress)
    wanted = zip(lists, (train_samples, validation_samples, test_samples), strict=True)
    return Datasets(*(builder.build(part, *arguments) for part, arguments in enumerate(wanted)))


def cache_beside(items: Sequence[str]) -> Path:
    """The folder for index caches beside the first of the files that a list names."""
    return Path(parse_blend(items)[0][0]).parent / "cache"


class _Builder:
    """Builds one part (0 train, 1 validation, 2 test) from a list of prefixes; opens each prefix once."""

    def __init__(
        self, split: str | None, seq_length: int, seed: int, cache: IndexCache | None, progress: bool
    ) -> None:
        self.split, self.seq_length, self.seed = split, seq_length, seed
        self.cache, self.progress = cache, progress
        self.opened: dict[str, IndexedDataset] = {}

    def build(self, part: int, items: Sequence[str] | None, num_samples: int | None) -> SampleDataset | None:
        if num_samples == 0:
            return None
        if items is None:
            raise DataError(f"data.{SPLITS[part]}: expected files of its own, found none: name them")
        prefixes, weights = parse_blend(items)
        # Megatron blends a lone prefix that has a weight, which changes its order, unless given per split.
        if len(prefixes) == 1 and (weights is None or self.split is None):
            return next(self._datasets(part, prefixes, [num_samples]))
        if weights is None:
            return self._by_size(part, prefixes, num_samples)
        if num_samples is None:
            raise DataError(
                f"data: weights {weights} need a number of samples: name one, or leave the weights out"
            )
        shares = normalize(weights).tolist()
        targets, counts = target_samples(shares, num_samples)
        datasets = list(self._datasets(part, prefixes, counts))
        return BlendedDataset(datasets, shares, sum(targets), self.cache, self.progress)

    def _by_size(self, part: int, prefixes: list[str], num_samples: int | None) -> BlendedDataset:
        """One epoch of each at most, in proportion to their lengths."""
        datasets = list(self._datasets(part, prefixes, [None] * len(prefixes)))
        sizes = [len(dataset) for dataset in datasets]
        count = sum(sizes) if num_samples is None else min(num_samples, sum(sizes))
        return BlendedDataset(datasets, sizes, count, self.cache, self.progress)

    def _datasets(self, part: int, prefixes: list[str], counts: Sequence[int | None]) -> Iterator[GPTDataset]:
        name = SPLITS[part]
        hidden = not self.progress
        bar = tqdm(prefixes, desc=f"{name} indices", unit="file", leave=False, disable=hidden)
        for prefix, count in zip(bar, counts, strict=True):
            if prefix not in self.opened:
                self.opened[prefix] = IndexedDataset(prefix)
            indexed = self.opened[prefix]
            bounds = self._bounds(indexed, part)
            yield GPTDataset(indexed, self.seq_length, count, self.seed, bounds, name, self.cache)

    def _bounds(self, indexed: IndexedDataset, part: int) -> tuple[int, int]:
        """The sequences of a part."""
        if self.split is None:
            return 0, len(indexed)
        bounds = split_sequences(self.split, len(indexed))[part]
        if bounds is None:
            remedy = f"give it a weight, name data.{SPLITS[part]}, or set logging.validate_every_steps=0"
            where = f"{indexed.prefix}: data.split {self.split!r}"
            raise DataError(f"{where} leaves nothing for {SPLITS[part]}: {remedy}")
        return bounds
