"""Samples to the micro batches of one data-parallel rank.

The position of a run in its data is one integer, the samples consumed so far. The global batch at that point
is the next `global_batch_samples` samples of the dataset, in order (Megatron's sequential sampler). Rank r of
dp_size takes the r-th of as many equal, contiguous slices. Neither the micro batch size nor what was read
before matters.
"""

from abc import ABC, abstractmethod
from collections.abc import Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from megalite.batch import Batch
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.token_ids import check_ids

_REMEDY = "set model.vocab_size above the largest id, or tokenize the data with the model's tokenizer"


class Samples(Protocol):
    """What the loader reads: i64 [seq_length + 1] by position, and where the documents in it start."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> np.ndarray: ...

    def document_starts(self, position: int) -> np.ndarray: ...


class Batches(Protocol):
    """Where a step's batch comes from."""

    def batch(self, consumed_samples: int) -> list[Batch]: ...


class SampleLoader(ABC):
    """Micro batches of one data-parallel rank; what a sample is, and how it becomes a batch, is a subclass's.

    reads_tokens: False on stages between the ends of a pipeline, which need neither ids nor labels.

    Raises DataError when the global batch does not divide over ranks and micro batches.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        global_batch_samples: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        reads_tokens: bool = True,
    ) -> None:
        if global_batch_samples < 1 or global_batch_samples % (dp_size * num_micro_batches):
            pieces = f"{dp_size} data-parallel ranks x {num_micro_batches} micro batches"
            raise DataError(f"global batch of {global_batch_samples} samples does not divide over {pieces}")
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank: expected 0 to {dp_size - 1}, found {dp_rank}")
        self.dataset, self.vocab_size, self.reads_tokens = dataset, vocab_size, reads_tokens
        self.global_batch_samples, self.num_micro_batches = global_batch_samples, num_micro_batches
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def batch(self, consumed_samples: int) -> list[Batch]:
        """The next global batch's part for this rank, after `consumed_samples` samples of the dataset.

        Returns num_micro_batches batches.

        Raises DataError when the dataset is exhausted or holds an id outside the vocabulary.
        """
        return self._read(self.positions(consumed_samples)).split(self.num_micro_batches)

    def positions(self, consumed_samples: int) -> range:
        """Which samples of the dataset that is."""
        end = consumed_samples + self.global_batch_samples
        if consumed_samples < 0 or end > len(self.dataset):
            asked = f"the batch needs samples {consumed_samples} to {end - 1}, found {len(self.dataset)}"
            raise DataError(f"the data is exhausted: {asked}: take fewer steps or build more samples")
        size = self.global_batch_samples // self.dp_size
        first = consumed_samples + self.dp_rank * size
        return range(first, first + size)

    @abstractmethod
    def _read(self, positions: range) -> Batch:
        """Those samples as one batch."""

    def _check_ids(self, ids: np.ndarray, positions: range) -> None:
        """Raise DataError at an id outside the vocabulary; ids [rows, s], equally many rows per sample."""
        size = ids.size // len(positions)
        check_ids(
            ids.reshape(-1),
            self.vocab_size,
            lambda place: f"sample {positions.start + place // size}",
            _REMEDY,
        )


class BatchLoader(SampleLoader):
    """Micro batches of token files: b samples each, with s = seq_length; labels are the inputs one token on.

    mask_documents: whether they say for each input where in the sample its document starts.
    """

    dataset: Samples

    def __init__(self, dataset: Samples, *, mask_documents: bool = False, **slices: Any) -> None:
        super().__init__(dataset, **slices)
        self.mask_documents = mask_documents

    def _read(self, positions: range) -> Batch:
        parts: dict[str, np.ndarray] = {}
        if self.reads_tokens:
            samples = np.stack([self.dataset[position] for position in positions])
            self._check_ids(samples, positions)
            parts |= {"input_ids": samples[:, :-1], "labels": samples[:, 1:]}
        if self.mask_documents:
            starts = [self.dataset.document_starts(position) for position in positions]
            parts["document_starts"] = np.stack(starts)
        fields: dict[str, Any] = {name: torch.from_numpy(part.copy()) for name, part in parts.items()}
        return Batch(**fields)


class PreparedBatches:
    """Reads each batch while the step before it computes; what a step sees does not change.

    An error of a batch that is read ahead is raised when, and only if, the batch is asked for.
    """

    def __init__(self, loader: SampleLoader) -> None:
        self.loader = loader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def batch(self, consumed_samples: int) -> list[Batch]:
        """As the loader's."""
        ready = self._ahead.pop(consumed_samples, None) or self._start(consumed_samples)
        following = consumed_samples + self.loader.global_batch_samples
        self._ahead = {following: self._start(following)}
        return ready.result()

    def _start(self, consumed_samples: int) -> Future[list[Batch]]:
        return self._thread.submit(self.loader.batch, consumed_samples)


def check_vocabulary(indexed: IndexedDataset, vocab_size: int, max_tokens: int = 64 << 20) -> None:
    """Scan the first `max_tokens` tokens of a file; raise DataError at an id outside the vocabulary."""
    tokens = indexed.tokens[:max_tokens]
    check_ids(tokens, vocab_size, lambda place: f"{indexed.prefix}.bin: token {place}", _REMEDY)
