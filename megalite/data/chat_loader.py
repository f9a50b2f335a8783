"""Conversations and pairs to the micro batches of one data-parallel rank."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megalite.batch import Batch
from megalite.data.chat_samples import ChatSamples, SampleRow
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
        expected = (self.num_references, 2)
        if references is not None and (references.shape != expected or dataset.kind == "conversations"):
            raise DataError(
                f"references: expected {list(expected)} of pairs or answers, found "
                f"{list(references.shape)} of {dataset.kind}"
            )
        self.references = None if references is None else references.astype(np.float32)

    @property
    def num_references(self) -> int:
        """Rows that `references` has."""
        return self.dataset.num_items

    def _read(self, positions: range) -> Batch:
        batch = self._batch([row for position in positions for row in self.dataset.rows(position)], positions)
        if self.references is None:
            return batch
        items = np.concatenate([self.dataset.items(position) for position in positions])
        return replace(batch, references=torch.from_numpy(self.references[items].reshape(-1)))

    def _batch(self, rows: list[SampleRow], positions: range) -> Batch:
        parts = {name: np.stack([getattr(row, name) for row in rows]) for name in SampleRow._fields}
        if self.reads_tokens:
            self._check_ids(parts["input_ids"], positions)
        else:
            del parts["input_ids"], parts["labels"]
        fields: dict[str, Any] = {name: torch.from_numpy(part) for name, part in parts.items()}
        return Batch(**fields)
