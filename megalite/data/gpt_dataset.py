"""Sequences to samples of fixed length, in the order of Megatron-core, bit for bit.

The chosen sequences are repeated for as many epochs as needed, shuffled (document index) and laid end to end.
Sample j is the seq_length + 1 tokens of that stream from token j * seq_length on, so its last token is the
first of sample j + 1. The samples are shuffled in turn (shuffle index). When less than 80 % of the last epoch
is needed, it is kept apart in both shuffles: the epochs before it are drawn completely before it begins.

All draws come from one `numpy.random.RandomState(seed)`, a stream that NumPy keeps frozen.

The order depends on the number of epochs. A run that goes on keeps the number that it began with; should it
come to need more samples than those hold, single epochs follow, the k-th drawn by `RandomState([seed, k])`.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megalite.data.cache import IndexCache
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset

SPLITS = ("train", "validation", "test")
_BLOCK = 1 << 16  # sequences


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


def plan_epochs(epoch_tokens: int, seq_length: int, num_samples: int | None) -> tuple[int, ...]:
    """How many epochs of `epoch_tokens` (> 0) hold `num_samples` (None: one epoch), by group.

    A group is shuffled as one: it is all epochs, or the last one is a group of its own.
    """
    if num_samples is None:
        return (1,)
    num_epochs = max(1, -(-(num_samples * seq_length + 1) // epoch_tokens))
    from_last = num_samples - ((num_epochs - 1) * epoch_tokens - 1) // seq_length
    apart = num_epochs > 1 and from_last < int(0.80 * ((epoch_tokens - 1) // seq_length))
    return (num_epochs - 1, 1) if apart else (num_epochs,)


def build_sample_index(
    lengths: np.ndarray,
    bounds: tuple[int, int],
    seq_length: int,
    epochs: Sequence[int],
    seed: int | Sequence[int],
) -> SampleIndex:
    """Index the samples of sequences [begin, end), which hold tokens, over groups of epochs."""
    num_sequences, num_epochs = bounds[1] - bounds[0], sum(epochs)
    total_tokens = num_epochs * int(lengths[slice(*bounds)].sum(dtype=np.int64))
    total = (total_tokens - 1) // seq_length
    before_last = (total_tokens // num_epochs * epochs[0] - 1) // seq_length

    random = np.random.RandomState(seed)
    documents = np.empty((num_epochs, num_sequences), np.int32 if bounds[1] <= 2**31 else np.int64)
    documents[:] = np.arange(*bounds)
    for group in _cut(documents, epochs[0]):
        random.shuffle(group.reshape(-1))
    samples = _sample_starts(lengths, documents.reshape(-1), seq_length, total)
    shuffle = np.arange(total, dtype=np.uint32 if total < 2**32 - 2 else np.int64)
    for part in _cut(shuffle, before_last if len(epochs) > 1 else total):
        random.shuffle(part)
    return SampleIndex(documents.reshape(-1), samples, shuffle)


def _cut(array: np.ndarray, at: int) -> list[np.ndarray]:
    """Views of both parts, or of the whole when nothing follows the first."""
    return [array[:at], array[at:]] if at < len(array) else [array]


def _sample_starts(lengths: np.ndarray, order: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """Rows (position in `order`, token in that sequence) of stream tokens 0, seq_length, 2 seq_length, ...

    Block by block, so that what is needed beside the result stays small.
    """
    starts = np.empty((num_samples + 1, 2), np.int32 if len(order) < 2**31 else np.int64)
    row = total_tokens = 0
    for begin in range(0, len(order), _BLOCK):
        sizes = lengths[order[begin : begin + _BLOCK]].astype(np.int64)
        ends = np.cumsum(sizes) + total_tokens
        rows_until = -(-ends // seq_length)  # as many rows begin before the end of each sequence
        rows = slice(row, int(rows_until[-1]))
        owners = np.cumsum(np.bincount(rows_until - row)[: rows.stop - row])  # sequences that ended before
        starts[rows, 0] = owners + begin
        starts[rows, 1] = np.arange(row, rows.stop) * seq_length - (ends - sizes)[owners]
        row, total_tokens = rows.stop, int(ends[-1])
    starts[0] = 0  # the original starts at position 0 even where that sequence is empty
    return starts


class GPTDataset:
    """Samples of seq_length + 1 tokens from the sequences [begin, end) of an indexed dataset.

    `dataset[i]` is i64 [seq_length + 1]: inputs are `[:-1]`, labels `[1:]`. There are at least `num_samples`,
    or one epoch when it is None. `split` only names the part in messages. With a cache, the indices are kept
    there and found again.

    epochs: those that the order began with, by group, in place of what `num_samples` takes; where they hold
        fewer samples, single epochs follow.

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
        cache: IndexCache | None = None,
        epochs: Sequence[int] | None = None,
    ) -> None:
        self.indexed, self.seq_length, self.seed, self.split = indexed, seq_length, seed, split
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
        self.epochs = tuple(epochs or plan_epochs(self.epoch_tokens, seq_length, num_samples))
        self.index = self._index(self.epochs, seed, cache)
        num_single = self._count_single_epochs(num_samples or 0)
        self.single_epochs = [self._index((1,), [seed, k], cache) for k in range(1, num_single + 1)]
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
        return sum(self.epochs) + len(self.single_epochs)

    @property
    def epoch_samples(self) -> int:
        """Samples of a single epoch."""
        return (self.epoch_tokens - 1) // self.seq_length

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides the samples and their order; not where the files lie."""
        return {
            **self.indexed.fingerprint,
            "sequences": list(self.bounds),
            "seq_length": self.seq_length,
            "epochs": list(self.epochs),
            "seed": self.seed,
        }

    def _count_single_epochs(self, num_samples: int) -> int:
        """How many must follow the first epochs, for so many samples in all."""
        missing = num_samples - len(self.index.shuffle)
        if missing <= 0:
            return 0
        if not self.epoch_samples:
            needed = f"one sample needs {self.seq_length + 1} tokens, an epoch has {self.epoch_tokens}"
            raise DataError(
                f"{self.indexed.prefix}: {self.split}: {missing} samples are to follow the epochs that the "
                f"run began with, and {needed}: add data, or give the run its former length"
            )
        return -(-missing // self.epoch_samples)

    def _index(
        self, epochs: Sequence[int], seed: int | Sequence[int], cache: IndexCache | None
    ) -> SampleIndex:
        def build() -> SampleIndex:
            lengths = self.indexed.sequence_lengths
            return build_sample_index(lengths, self.bounds, self.seq_length, epochs, seed)

        if cache is None:
            return build()
        made_from = {"kind": "samples", **self.fingerprint, "epochs": list(epochs), "seed": seed}
        return SampleIndex(**cache.get(made_from, lambda: build()._asdict()))

    def __len__(self) -> int:
        return len(self.index.shuffle) + len(self.single_epochs) * self.epoch_samples

    def __getitem__(self, position: int) -> np.ndarray:
        sequences, start, stop = self._locate(position)
        if len(sequences) == 1:
            return self.indexed.get(sequences[0], start, stop - start + 1).astype(np.int64)
        parts = [self.indexed.get(sequences[0], start)]
        parts += [self.indexed.get(sequence) for sequence in sequences[1:-1]]
        parts.append(self.indexed.get(sequences[-1], 0, stop + 1))
        return np.concatenate(parts, dtype=np.int64)

    def document_starts(self, position: int) -> np.ndarray:
        """Per input of a sample, where in it that token's sequence starts, i64 [seq_length].

        A document of several sequences starts anew with each of them.
        """
        sequences, start, stop = self._locate(position)
        sizes = self.indexed.sequence_lengths[sequences].astype(np.int64)
        sizes[-1] = stop
        sizes[0] -= start
        return np.repeat(np.cumsum(sizes) - sizes, sizes)

    def _locate(self, position: int) -> tuple[list[int], int, int]:
        """The sequences of a sample, the first token used in the first of them, and the end of its inputs."""
        if not 0 <= position < len(self):
            raise IndexError(f"{self.indexed.prefix}: {self.split} sample {position} of {len(self)}")
        index, beyond = self.index, position - len(self.index.shuffle)
        if beyond >= 0:
            epoch, position = divmod(beyond, self.epoch_samples)
            index = self.single_epochs[epoch]
        sample = int(index.shuffle[position])
        (first, start), (last, stop) = index.samples[sample : sample + 2].tolist()
        return index.documents[first : last + 1].tolist(), start, stop
