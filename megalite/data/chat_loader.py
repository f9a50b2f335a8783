"""Conversations and pairs to the micro batches of one data-parallel rank."""

from typing import Any

import numpy as np
import torch

from megalite.batch import Batch
from megalite.data.chat_samples import ChatSamples
from megalite.data.error import DataError
from megalite.data.loader import SampleLoader


class ChatLoader(SampleLoader):
    """Micro batches of b samples: b rows of conversations, or 2b rows of pairs (chosen, rejected, ...).

    Each has document_starts and padding, and where tokens are read, input_ids and labels.

    references: fp32 [pairs, 2], the log-probabilities of each pair's two answers under the weights that
    preferences are measured against; None for batches without.

    Raises DataError when there are not as many references as pairs.
    """

    dataset: ChatSamples

    def __init__(self, dataset: ChatSamples, *, references: np.ndarray | None = None, **slices: Any) -> None:
        super().__init__(dataset, **slices)
        expected = (dataset.num_items, dataset.sequences_per_item)
        if references is not None and (references.shape != expected or expected[1] != 2):
            raise DataError(f"references: expected {list(expected)} of pairs, found {list(references.shape)}")
        self.references = references

    def _read(self, positions: range) -> Batch:
        rows = [row for position in positions for row in self.dataset.rows(position)]
        parts = {name: np.stack([getattr(row, name) for row in rows]) for name in rows[0]._fields}
        if self.reads_tokens:
            self._check_ids(parts["input_ids"], positions)
        else:
            del parts["input_ids"], parts["labels"]
        if self.references is not None:
            items = np.concatenate([self.dataset.items(position) for position in positions])
            parts["references"] = self.references[items].astype(np.float32).reshape(-1)
        return Batch(**{name: torch.from_numpy(part) for name, part in parts.items()})
