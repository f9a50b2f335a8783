"""Several datasets mixed by weight, in the order of Megatron-core."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from megalite.data.cache import Arrays, IndexCache
from megalite.data.error import DataError
from megalite.data.gpt_dataset import GPTDataset
from megalite.data.indexed_dataset import IndexedDataset

MAX_DATASETS = 32_766
_FEW, _BLOCK = 30, 1 << 16
SURPLUS = 0.005  # a dataset is built a little larger than its share, since the greedy order may ask for more


def parse_blend(items: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes, or weight and prefix in turn, to (prefixes, weights or None).

    An odd number of items, or none of every second item being a number, means prefixes only.
    """
    heads = [_number(item) for item in items[::2]]
    if not items:
        raise DataError("data: expected at least 1 prefix, found an empty list")
    if len(items) % 2 or all(head is None for head in heads):
        return [item.strip() for item in items], None
    weights = [head for head in heads if head is not None]
    if len(weights) < len(heads):
        bad = items[2 * heads.index(None)]
        raise DataError(
            f"data: weight: expected a number before each prefix, found {bad!r}: write WEIGHT PREFIX ..."
        )
    if min(weights) <= 0 or not math.isfinite(sum(weights)):
        raise DataError(
            f"data: weight: expected numbers above 0, found {weights}: leave datasets without weight out"
        )
    return [item.strip() for item in items[1::2]], weights


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def normalize(weights: Sequence[float]) -> np.ndarray:
    """Weights that sum to 1, in float64."""
    array = np.array(weights, dtype=np.float64)
    return array / array.sum()


def target_samples(
    weights: Sequence[float], num_samples: int, surplus: float = SURPLUS
) -> tuple[list[int], list[int]]:
    """Per dataset: its share of `num_samples`, and how many samples to build for it."""
    targets = [math.ceil(num_samples * float(weight)) for weight in weights]
    return targets, [math.ceil(target * (1 + surplus)) for target in targets]


def blend_by_weight(weights: Sequence[float], num_samples: int, progress: bool = False) -> np.ndarray:
    """The dataset of each sample, i16 [num_samples]: always the one furthest behind its share.

    Sample i goes to the first maximum over k of weights[k] * max(i, 1) - used[k]. With sizes as weights and
    their sum as `num_samples`, each dataset is used up exactly at the end: the terms sum to 0, so the maximum
    is never below 0, where a used-up dataset stands. Megatron's "exhaustive" order is therefore this one.
    """
    return blend_by_share(normalize(weights), num_samples, progress)


def blend_by_share(shares: np.ndarray, num_samples: int, progress: bool = False) -> np.ndarray:
    """The same, of weights that are normalised: a further division might change their last bit."""
    choose = _choose_of_few if len(shares) <= _FEW else _choose_of_many
    used = np.zeros(len(shares))
    chosen = np.empty(num_samples, np.int16)
    blocks = range(0, num_samples, _BLOCK)
    for start in tqdm(blocks, desc="blend", unit="block", delay=2, leave=False, disable=not progress):
        stop = min(start + _BLOCK, num_samples)
        chosen[start:stop] = choose(shares, used, range(start, stop))
        used += np.bincount(chosen[start:stop], minlength=len(used))
    return chosen


def _choose_of_few(shares: np.ndarray, used: np.ndarray, positions: range) -> list[int]:
    """Plain floats are faster than arrays of a few, and the same numbers."""
    pairs, counts, chosen = shares.tolist(), used.tolist(), []
    for i in positions:
        at = i or 1
        behind = [share * at - count for share, count in zip(pairs, counts, strict=True)]
        k = behind.index(max(behind))
        chosen.append(k)
        counts[k] += 1
    return chosen


def _choose_of_many(shares: np.ndarray, used: np.ndarray, positions: range) -> list[int]:
    counts, behind, chosen = used.copy(), np.empty(len(used)), []
    for i in positions:
        np.multiply(shares, float(i or 1), out=behind)
        np.subtract(behind, counts, out=behind)
        k = int(behind.argmax())
        chosen.append(k)
        counts[k] += 1
    return chosen


def positions_within(chosen: np.ndarray, num_datasets: int) -> np.ndarray:
    """Per sample, how many samples of its dataset come before it, i64 [num_samples]."""
    order = np.argsort(chosen, kind="stable")  # dataset by dataset, each in the order of its samples
    counts = np.bincount(chosen, minlength=num_datasets)
    positions = np.empty(len(chosen), np.int64)
    positions[order] = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    return positions


@dataclass(frozen=True)
class Before:
    """What a run had read when its blend began.

    read: samples of each dataset of the blend. former: of each dataset that has no part in it any more, what
        was recorded of it (`describe_data`), with the samples `read` of it.
    """

    read: tuple[int, ...]
    former: tuple[Mapping[str, Any], ...] = ()

    @property
    def samples(self) -> int:
        """In all: the place in the run's data at which the blend begins."""
        return sum(self.read) + sum(row["read"] for row in self.former)


class BlendedDataset:
    """`num_samples` samples of several datasets mixed by weight; `dataset[i]` is i64 [seq_length + 1].

    With a cache, the order is kept there and found again.

    before: what came before them: then they count on from there, each dataset from its next unread sample.

    Raises DataError when the order asks a dataset for more samples than it holds, and for a sample of before.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float],
        num_samples: int,
        cache: IndexCache | None = None,
        progress: bool = False,
        before: Before | None = None,
    ) -> None:
        if not 0 < len(datasets) <= MAX_DATASETS:
            raise DataError(f"data: expected 1 to {MAX_DATASETS} datasets in a blend, found {len(datasets)}")
        self.datasets, self.weights = tuple(datasets), normalize(weights).tolist()
        self.before = before or Before((0,) * len(datasets))
        self._first = self.before.samples
        made_from = {"kind": "blend", "weights": self.weights, "num_samples": num_samples}

        def build() -> Arrays:
            chosen = blend_by_weight(weights, num_samples, progress)
            return {"dataset_index": chosen, "sample_index": positions_within(chosen, len(datasets))}

        index = build() if cache is None else cache.get(made_from, build)
        self.dataset_index, self.sample_index = index["dataset_index"], index["sample_index"]
        self._check_sizes()

    def _check_sizes(self) -> None:
        asked = np.bincount(self.dataset_index, minlength=len(self.datasets)) + self.before.read
        for dataset, count in zip(self.datasets, asked.tolist(), strict=True):
            if count > len(dataset):
                prefix = dataset.indexed.prefix
                remedy = "ask for fewer samples, or give it more weight than a rounding error"
                raise DataError(
                    f"{prefix}: the blend asks for {count} samples, found {len(dataset)}: {remedy}"
                )

    @property
    def indexed_datasets(self) -> tuple[IndexedDataset, ...]:
        """The token files behind the samples."""
        return tuple(dataset.indexed for dataset in self.datasets)

    def __len__(self) -> int:
        return self._first + len(self.dataset_index)

    def __getitem__(self, position: int) -> np.ndarray:
        dataset, within = self._locate(position)
        return dataset[within]

    def document_starts(self, position: int) -> np.ndarray:
        """As GPTDataset gives them."""
        dataset, within = self._locate(position)
        return dataset.document_starts(within)

    def _locate(self, position: int) -> tuple[GPTDataset, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"blended sample {position} of {len(self)}")
        index = position - self._first
        if index < 0:
            raise DataError(
                f"sample {position} is of data that the run has left after {self._first} samples: start the "
                "run again, so that it changes its data where its newest checkpoint stands"
            )
        number = self.dataset_index[index]
        return self.datasets[number], self.before.read[number] + int(self.sample_index[index])
