"""Several datasets mixed by weight, in the order of Megatron-core."""

import math
from collections.abc import Sequence

import numpy as np

from megalite.data.error import DataError
from megalite.data.gpt_dataset import GPTDataset
from megalite.data.indexed_dataset import IndexedDataset

MAX_DATASETS = 32_766
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
    """For each dataset: its share of `num_samples`, and how many samples to build for it."""
    targets = [math.ceil(num_samples * float(weight)) for weight in weights]
    return targets, [math.ceil(target * (1 + surplus)) for target in targets]


def blend_by_weight(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """The dataset of each sample, i16 [num_samples]: always the one furthest behind its share.

    Sample i goes to the first maximum over k of weights[k] * max(i, 1) - used[k]. With sizes as weights and
    their sum as `num_samples`, each dataset is used up exactly at the end: the terms sum to 0, so the maximum
    is never below 0, where a used-up dataset stands. Megatron's "exhaustive" order is therefore this one.
    """
    shares, used = normalize(weights), np.zeros(len(weights))
    chosen, behind = np.empty(num_samples, np.int16), np.empty(len(weights))
    for i in range(num_samples):
        np.multiply(shares, float(max(i, 1)), out=behind)
        np.subtract(behind, used, out=behind)
        k = behind.argmax()
        chosen[i] = k
        used[k] += 1
    return chosen


class BlendedDataset:
    """`num_samples` samples of several datasets mixed by weight; `dataset[i]` is i64 [seq_length + 1].

    Raises DataError when the order asks a dataset for more samples than it holds.
    """

    def __init__(self, datasets: Sequence[GPTDataset], weights: Sequence[float], num_samples: int) -> None:
        if not 0 < len(datasets) <= MAX_DATASETS:
            raise DataError(f"data: expected 1 to {MAX_DATASETS} datasets in a blend, found {len(datasets)}")
        self.datasets = tuple(datasets)
        self.dataset_index = blend_by_weight(weights, num_samples)
        self.sample_index = np.empty(len(self.dataset_index), np.int64)
        for k, dataset in enumerate(self.datasets):
            where = np.flatnonzero(self.dataset_index == k)
            if len(where) > len(dataset):
                prefix = dataset.indexed.prefix
                remedy = "ask for fewer samples, or give it more weight than a rounding error"
                raise DataError(
                    f"{prefix}: the blend asks for {len(where)} samples, found {len(dataset)}: {remedy}"
                )
            self.sample_index[where] = np.arange(len(where))

    @property
    def indexed_datasets(self) -> tuple[IndexedDataset, ...]:
        """The token files behind the samples."""
        return tuple(dataset.indexed for dataset in self.datasets)

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, position: int) -> np.ndarray:
        if not 0 <= position < len(self):
            raise IndexError(f"blended sample {position} of {len(self)}")
        return self.datasets[self.dataset_index[position]][int(self.sample_index[position])]
