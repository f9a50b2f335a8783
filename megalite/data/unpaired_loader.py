"""Single answers, each desirable or not, to the micro batches of one data-parallel rank, for KTO.

Beside each answer goes a mismatched row: the same prompt with the answer of the sample before it in the
global batch; the first has that of the last. So both have the same answers, and no layout changes them.
"""

from dataclasses import replace
from typing import Any

import torch

from megalite.batch import Batch
from megalite.data.chat_loader import ChatLoader
from megalite.data.chat_samples import ChatSamples
from megalite.data.error import DataError


class UnpairedLoader(ChatLoader):
    """Micro batches of b answers, and within each one of as many mismatched rows.

    references: fp32 [samples, 2], log-probabilities of each sample's answer, and of that in its mismatched
    row, under the weights that preferences are measured against.

    Raises DataError where a global batch is a single sample, which has no other answer, or where the samples
    are no whole batches: a run that changed its batch size in between would mix other answers than before.
    """

    def __init__(self, dataset: ChatSamples, **options: Any) -> None:
        super().__init__(dataset, **options)
        if self.global_batch_samples < 2:
            raise DataError(
                "preference.loss kto compares with other answers of the batch, and train_batch_size is 1: "
                "use 2 or more"
            )
        if len(dataset) % self.global_batch_samples:
            raise DataError(
                f"preference.loss kto compares with other answers of the batch, and {len(dataset)} samples "
                f"are no whole batches of {self.global_batch_samples}: keep the run's former train_batch_size"
            )

    @property
    def num_references(self) -> int:
        return len(self.dataset)

    def _read(self, positions: range) -> Batch:
        first = positions.start - self.dp_rank * len(positions)  # of the global batch
        before = [first + (position - first - 1) % self.global_batch_samples for position in positions]
        rows = [self.dataset.rows(position)[0] for position in positions]
        mixed = [self.dataset.mismatched(*both) for both in zip(positions, before, strict=True)]
        desirable = torch.tensor([self.dataset.is_desirable(position) for position in positions])
        own, mismatched = self._batch(rows, positions), self._batch(mixed, positions)
        if self.references is not None:
            found = torch.from_numpy(self.references[positions.start : positions.stop].T.copy())
            own, mismatched = replace(own, references=found[0]), replace(mismatched, references=found[1])
        return replace(own, desirable=desirable, mismatched=mismatched)
