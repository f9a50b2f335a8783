"""Prefixes, weights and a split to the training, validation and test datasets of a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megalite.data.blend import Before, BlendedDataset, normalize, parse_blend, target_samples
from megalite.data.cache import IndexCache
from megalite.data.error import DataError
from megalite.data.gpt_dataset import SPLITS, GPTDataset, split_sequences
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.past import Past, Row

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
    past: Past | None = None,
) -> Datasets:
    """The datasets of a run, with at least as many samples as are wanted.

    Each list holds prefixes, or weight and prefix in turn. With `train` alone, all parts come from its
    sequences, cut by `split`; else each part has a list of its own, used whole, and `split` has no effect.
    The order of the samples is that of Megatron-core for `blend` and `split`, or for `blend_per_split`.

    Megatron's counts: train_samples = steps * global batch; validation_samples =
    (steps // validate_every + 1) * validation_steps * global batch. None stands for one epoch of every file,
    which leaves no room for weights.

    past: what a run that goes on has trained on. Then `train_samples` counts from its beginning. The same
    list goes on as it was, with further epochs if it needs them; another one begins where the run stands, and
    each dataset that it knows with the first sample that was not read.

    Raises DataError for files, weights or a split that cannot serve.
    """
    separate = validation is not None or test is not None
    lists = [train, validation, test] if separate else [train] * len(SPLITS)
    builder = _Builder(None if separate else split, seq_length, seed, cache, progress)
    wanted = zip(lists, (train_samples, validation_samples, test_samples), (past, None, None), strict=True)
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

    def build(
        self, part: int, items: Sequence[str] | None, num_samples: int | None, past: Past | None
    ) -> SampleDataset | None:
        if num_samples == 0:
            return None
        if items is None:
            raise DataError(f"data.{SPLITS[part]}: expected files of its own, found none: name them")
        prefixes, weights = parse_blend(items)
        if past is not None:
            assert num_samples is not None, "a run that goes on has a length"
            return self._continue(part, prefixes, weights, num_samples, past)
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

    def _continue(
        self, part: int, prefixes: list[str], weights: list[float] | None, num_samples: int, past: Past
    ) -> SampleDataset:
        """The datasets of a run that goes on, in the same blend or in another that begins where it stands."""
        found = past.find([self._identity(part, prefix) for prefix in prefixes])
        is_lone, by_size = len(prefixes) == 1, weights is None and len(prefixes) > 1
        epochs = [past.epochs(at) or ([1] if by_size else None) for at in found]

        def weigh(before: Before) -> list[float]:
            if by_size:
                rows = zip(prefixes, epochs, before.read, strict=True)
                return [self._samples_left(part, *row) for row in rows]
            return normalize(weights or [1.0]).tolist()

        before = past.before_blend(found, weigh)
        shares, wanted = weigh(before), num_samples - before.samples
        if is_lone and not before.samples and (weights is None or self.split is None):
            return next(self._datasets(part, prefixes, [wanted], epochs))
        if not all(shares):
            raise DataError(
                f"{prefixes[shares.index(0)]}: no unread sample is left, and without weights no file is "
                "read twice: leave it out, or give weights"
            )
        targets, counts = (shares, shares) if by_size else target_samples(shares, wanted)
        counts = [read + int(count) for read, count in zip(before.read, counts, strict=True)]
        datasets = list(self._datasets(part, prefixes, counts, epochs))
        total = min(wanted, int(sum(shares))) if by_size else int(sum(targets))
        return BlendedDataset(datasets, shares, total, self.cache, self.progress, before)

    def _samples_left(self, part: int, prefix: str, epochs: Sequence[int] | None, read: int) -> int:
        """Of a file, up to the end of the epochs that it began with; later, of the one that it stands in."""
        indexed, bounds = self._open(part, prefix)
        tokens = int(indexed.sequence_lengths[slice(*bounds)].sum(dtype=np.int64))
        of_first, of_one = ((count * tokens - 1) // self.seq_length for count in (sum(epochs or [1]), 1))
        return of_first - read if read < of_first else (of_first - read) % max(of_one, 1)

    def _identity(self, part: int, prefix: str) -> Row:
        """What tells a dataset and the order of its samples apart from others, but for its epochs."""
        indexed, bounds = self._open(part, prefix)
        order = {"sequences": list(bounds), "seq_length": self.seq_length, "seed": self.seed}
        content = {"ids_sha256": indexed.ids_sha256, **indexed.fingerprint}
        return {"prefix": indexed.prefix, **content, **order}

    def _datasets(
        self,
        part: int,
        prefixes: list[str],
        counts: Sequence[int | None],
        epochs: Sequence[Sequence[int] | None] | None = None,
    ) -> Iterator[GPTDataset]:
        """epochs: per prefix those that its order began with, where it is there already."""
        name = SPLITS[part]
        hidden = not self.progress
        bar = tqdm(prefixes, desc=f"{name} indices", unit="file", leave=False, disable=hidden)
        for prefix, count, begun in zip(bar, counts, epochs or [None] * len(prefixes), strict=True):
            indexed, bounds = self._open(part, prefix)
            yield GPTDataset(indexed, self.seq_length, count, self.seed, bounds, name, self.cache, begun)

    def _open(self, part: int, prefix: str) -> tuple[IndexedDataset, tuple[int, int]]:
        """A file, and the sequences of a part."""
        if prefix not in self.opened:
            self.opened[prefix] = IndexedDataset(prefix)
        return self.opened[prefix], self._bounds(self.opened[prefix], part)

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
