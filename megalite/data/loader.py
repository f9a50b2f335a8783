"""Samples to the micro batches of one data-parallel rank.

The position of a run in its data is one integer, the samples consumed so far. The global batch at that point
is the next `global_batch_samples` samples of the dataset, in order (Megatron's sequential sampler). Rank r of
dp_size takes the r-th of as many equal, contiguous slices. Neither the micro batch size nor what was read
before matters.
"""

from typing import Protocol

import numpy as np
import torch

from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset

_SCAN_TOKENS = 1 << 22
_REMEDY = "set model.vocab_size above the largest id, or tokenize the data with the model's tokenizer"


class Samples(Protocol):
    """What the loader reads: i64 [seq_length + 1] by position, and where the documents in it start."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> np.ndarray: ...

    def document_starts(self, position: int) -> np.ndarray: ...


class BatchLoader:
    """Micro batches for one data-parallel rank; b samples each, with s = seq_length.

    Raises DataError when the global batch does not divide over ranks and micro batches.
    """

    def __init__(
        self,
        dataset: Samples,
        global_batch_samples: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        mask_documents: bool = False,
    ) -> None:
        if global_batch_samples < 1 or global_batch_samples % (dp_size * num_micro_batches):
            pieces = f"{dp_size} data-parallel ranks x {num_micro_batches} micro batches"
            raise DataError(f"global batch of {global_batch_samples} samples does not divide over {pieces}")
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank: expected 0 to {dp_size - 1}, found {dp_rank}")
        self.dataset, self.vocab_size = dataset, vocab_size
        self.global_batch_samples, self.num_micro_batches = global_batch_samples, num_micro_batches
        self.dp_rank, self.dp_size, self.mask_documents = dp_rank, dp_size, mask_documents

    def batch(self, consumed_samples: int) -> list[tuple[torch.Tensor, ...]]:
        """The next global batch's part for this rank, after `consumed_samples` samples of the dataset.

        Returns num_micro_batches pairs (input_ids, labels), each i64 [b, s]; labels are inputs one token on.
        With mask_documents, a third tensor says for each input where in the sample its document starts.

        Raises DataError when the dataset is exhausted or holds an id outside the vocabulary.
        """
        end = consumed_samples + self.global_batch_samples
        if consumed_samples < 0 or end > len(self.dataset):
            asked = f"the batch needs samples {consumed_samples} to {end - 1}, found {len(self.dataset)}"
            raise DataError(f"the data is exhausted: {asked}: take fewer steps or build more samples")
        size = self.global_batch_samples // self.dp_size
        first = consumed_samples + self.dp_rank * size
        positions = range(first, first + size)
        samples = np.stack([self.dataset[position] for position in positions])
        self._check_vocabulary(samples, first)
        parts = [samples[:, :-1], samples[:, 1:]]
        if self.mask_documents:
            parts.append(np.stack([self.dataset.document_starts(position) for position in positions]))
        tensors = [torch.from_numpy(part.copy()).chunk(self.num_micro_batches) for part in parts]
        return list(zip(*tensors, strict=True))

    def _check_vocabulary(self, samples: np.ndarray, first: int) -> None:
        bad = _first_outside(samples, self.vocab_size)
        if bad is not None:
            row, column = divmod(bad, samples.shape[1])
            found = f"found token id {samples[row, column]} in sample {first + row}"
            raise DataError(f"vocabulary: expected ids 0 to {self.vocab_size - 1}, {found}: {_REMEDY}")


def check_vocabulary(indexed: IndexedDataset, vocab_size: int, max_tokens: int = 64 << 20) -> None:
    """Scan the first `max_tokens` tokens of a file; raise DataError at an id outside the vocabulary."""
    tokens = indexed.tokens[:max_tokens]
    for start in range(0, len(tokens), _SCAN_TOKENS):
        block = tokens[start : start + _SCAN_TOKENS]
        bad = _first_outside(block, vocab_size)
        if bad is not None:
            found = f"found token id {block[bad]} at token {start + bad}"
            raise DataError(
                f"{indexed.prefix}.bin: vocabulary: expected ids 0 to {vocab_size - 1}, {found}: {_REMEDY}"
            )


def _first_outside(ids: np.ndarray, vocab_size: int) -> int | None:
    """Flat position of the first id outside [0, vocab_size), or None."""
    if not ids.size or (ids.min() >= 0 and ids.max() < vocab_size):
        return None
    return int(np.argmax((ids < 0) | (ids >= vocab_size)))
