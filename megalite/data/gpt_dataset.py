"""Sequences to samples of fixed length, in the order of Megatron-core, bit for bit.

The chosen sequences are repeated for as many epochs as needed, shuffled (document index) and laid end to end.
Sample j is the seq_length + 1 tokens of that stream from token j * seq_length on, so its last token is the
first of sample j + 1. The samples are shuffled in turn (shuffle index). When less than 80 % of the last epoch
is needed, it is kept apart in both shuffles: the epochs before it are drawn completely before it begins.

All draws come from one `numpy.random.RandomState(seed)`, a stream that NumPy keeps frozen.
"""

import re
from typing import NamedTuple

import numpy as np

from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset

SPLITS = ("train", "validation", "test")


class SampleIndex(NamedTuple):
    """Where each sample lies.

    documents [epochs * sequences] i32: the order of the sequences. samples [n + 1, 2]: row j is where sample
    j begins, as (position in `documents`, token within that sequence). shuffle [n]: dataset position to j.
    """

    documents: np.ndarray
    samples: np.ndarray
    shuffle: np.ndarray


def split_sequences(split: str, num_sequences: int) -> list[tuple[int, int] | None]:
    """Cut `num_sequences` by weights such as "969,30,1" into [begin, end) for train, validation and test.

    A part without weight is None. Rounding is half to even, as in Megatron.
    """
    if not re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(\s*,\s*(\d+\.?\d*|\.\d+)){0,2}\s*", split):
        raise DataError(f"data.split: expected up to 3 weights such as '969,30,1', found {split!r}")
    weights = [float(weight) for weight in split.split(",")]
    weights += [0.0] * (len(SPLITS) - len(weights))
    total = np.array(weights, dtype=np.float64).sum()
    if total <= 0:
        raise DataError(f"data.split: expected a sum above 0, found {split!r}")
    ends = [0.0]
    for weight in weights:
        ends.append(ends[-1] + float(weight / total))
    cuts = [round(end * float(num_sequences)) for end in ends]
    return [
        (cuts[part], cuts[part + 1]) if ends[part + 1] > ends[part] else None for part in range(len(SPLITS))
    ]


def build_sample_index(
    lengths: np.ndarray, bounds: tuple[int, int], seq_length: int, num_samples: int | None, seed: int
) -> SampleIndex:
    """Index at least `num_samples` samples (None: one epoch) of sequences [begin, end) that hold tokens."""
    chosen = np.arange(*bounds, dtype=np.int32)
    epoch_tokens = int(lengths[bounds[0] : bounds[1]].sum(dtype=np.int64))
    num_epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // epoch_tokens))
    total = (num_epochs * epoch_tokens - 1) // seq_length
    before_last = ((num_epochs - 1) * epoch_tokens - 1) // seq_length
    from_last = (num_samples or 0) - before_last
    apart = num_epochs > 1 and from_last < int(0.80 * ((epoch_tokens - 1) // seq_length))

    random = np.random.RandomState(seed)
    documents: list[np.ndarray] = [
        np.tile(chosen, count) for count in ([num_epochs - 1, 1] if apart else [num_epochs])
    ]
    for epochs in documents:
        random.shuffle(epochs)
    order = np.concatenate(documents)
    samples = _sample_starts(lengths, order, seq_length, total)
    dtype = np.uint32 if total < 2**32 - 2 else np.int64
    ranges = [(0, before_last), (before_last, total)] if apart else [(0, total)]
    shuffle = [np.arange(*part, dtype=dtype) for part in ranges]
    for positions in shuffle:
        random.shuffle(positions)
    return SampleIndex(order, samples, np.concatenate(shuffle))


def _sample_starts(lengths: np.ndarray, order: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """Rows (position in `order`, token in that sequence) of stream tokens 0, seq_length, 2 seq_length, ..."""
    ends = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths[order], out=ends[1:])
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    owners = np.searchsorted(ends, tokens, side="right") - 1  # skips empty sequences
    starts = np.stack([owners, tokens - ends[owners]], axis=1)
    starts[0] = 0  # the original starts at position 0 even where that sequence is empty
    wide = max(len(order), int(lengths.max())) > 2**31 - 1
    return starts.astype(np.int64 if wide else np.int32)


class GPTDataset:
    """Samples of seq_length + 1 tokens from the sequences [begin, end) of an indexed dataset.

    `dataset[i]` is i64 [seq_length + 1]: inputs are `[:-1]`, labels `[1:]`. There are at least `num_samples`,
    or one epoch when it is None. `split` only names the part in messages.

    Raises DataError when the part holds too few tokens.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_length: int,
        num_samples: int | None,
        seed: int,
        bounds: tuple[int, int] | None = None,
        split: str = "train",
    ) -> None:
        self.indexed, self.seq_length, self.split = indexed, seq_length, split
        self.bounds = bounds = (0, len(indexed)) if bounds is None else bounds
        if not 0 <= bounds[0] <= bounds[1] <= len(indexed):
            raise DataError(
                f"{indexed.prefix}: {split} bounds: expected within 0 to {len(indexed)}, found {bounds}"
            )
        if seq_length < 1 or (num_samples is not None and num_samples < 0):
            found = f"seq_length {seq_length} and {num_samples} samples"
            raise DataError(
                f"{indexed.prefix}: {split}: expected at least 1 token and 0 samples, found {found}"
            )
        self.epoch_tokens = int(indexed.sequence_lengths[slice(*bounds)].sum(dtype=np.int64))
        if self.epoch_tokens == 0:
            found = f"{bounds[1] - bounds[0]} of {len(indexed)} sequences and no token"
            raise DataError(
                f"{indexed.prefix}: {split} split is empty: {found}: change data.split or add data"
            )
        self.index = build_sample_index(indexed.sequence_lengths, bounds, seq_length, num_samples, seed)
        if num_samples is None and len(self) == 0:
            needed = f"one sample needs {seq_length + 1} tokens, found {self.epoch_tokens}"
            raise DataError(
                f"{indexed.prefix}: {split} split is too small: {needed}: lower data.seq_length or add data"
            )

    @property
    def indexed_datasets(self) -> tuple[IndexedDataset, ...]:
        """The token files behind the samples."""
        return (self.indexed,)

    @property
    def num_epochs(self) -> int:
        """How often the sequences are passed through."""
        return len(self.index.documents) // (self.bounds[1] - self.bounds[0])

    def __len__(self) -> int:
        return len(self.index.shuffle)

    def __getitem__(self, position: int) -> np.ndarray:
        if not 0 <= position < len(self):
            raise IndexError(f"{self.indexed.prefix}: {self.split} sample {position} of {len(self)}")
        sample = int(self.index.shuffle[position])
        (first, start), (last, stop) = self.index.samples[sample : sample + 2].tolist()
        documents = self.index.documents[first : last + 1].tolist()
        if first == last:
            return self.indexed.get(documents[0], start, stop - start + 1).astype(np.int64)
        parts = [self.indexed.get(documents[0], start)]
        parts += [self.indexed.get(document) for document in documents[1:-1]]
        parts.append(self.indexed.get(documents[-1], 0, stop + 1))
        return np.concatenate(parts, dtype=np.int64)
