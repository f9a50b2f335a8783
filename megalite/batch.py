"""What a step is made of: token ids, what is to be predicted, and what each token may see."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

IGNORED = -100  # the label of a token that has no part in the loss, as in torch and transformers


@dataclass(frozen=True)
class Batch:
    """Samples of one length, each field [b, s] but the last, or None where the rank does not need it.

    A loader makes it, the pipeline passes it on unopened, and each stage takes what it needs.

    Attributes:
        input_ids: i64; needed where the embedding is.
        labels: i64, the next tokens; needed where the loss is. IGNORED has no part in the loss.
        loss_weights: fp32, how much each label counts; None counts each once.
        positions: i64, of each token for the rotary angles; None stands for 0, 1, 2, ..., or for the place
            in its document where documents are given.
        document_starts: i64, where in the sample each token's document starts: attention stays within it. Of
            the whole sample also where the other fields are of a part of it.
        padding: bool, true for tokens that only fill up the sample: the load of experts leaves them out.
        references: fp32 [b], log-probability of each row's labels under the weights that preferences are
            measured against. Rows are pairs then, unless they say whether each is desirable: rows 2i and
            2i + 1 are a chosen and a rejected answer.
        desirable: bool [b], whether each row's answer is one to learn or one to avoid.
        mismatched: b rows of these prompts with answers to others, with references of their own.
        reference_point: fp32 scalar, what KTO compares each row's log-probability over its reference with.
    """

    input_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    document_starts: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    references: torch.Tensor | None = None
    desirable: torch.Tensor | None = None
    mismatched: "Batch | None" = None
    reference_point: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with a function applied to each tensor that is there, of mismatched rows too."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: x.map(function) if isinstance(x, Batch) else function(x)
            for name, x in parts.items()
            if x is not None
        }
        return Batch(**mapped)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def split(self, num_parts: int) -> list["Batch"]:
        """Micro batches: as many equal runs of samples, pairs undivided."""
        references = self.references if self.desirable is None else None
        if references is not None and len(references) % (2 * num_parts):
            pairs = len(references) // 2
            raise ValueError(f"{pairs} pairs do not divide into {num_parts} parts: use a divisor")
        return [self.map(lambda x, i=i: x.chunk(num_parts)[i]) for i in range(num_parts)]  # type: ignore[misc]

    def part(self, places: torch.Tensor) -> "Batch":
        """The same samples at these places alone, int64; but for the document starts, which stay whole."""
        names = ("input_ids", "labels", "loss_weights", "positions", "padding")
        held = {name: x[:, places] for name in names if (x := getattr(self, name)) is not None}
        if self.mismatched is not None:
            held["mismatched"] = self.mismatched.part(places)
        return replace(self, **held)

    def loss_count(self) -> torch.Tensor:
        """What the loss sum is to be divided by: the labels that count, each by its weight; fp64 scalar."""
        assert self.labels is not None
        counts = self.labels != IGNORED
        if self.loss_weights is None:
            return counts.sum(dtype=torch.float64)
        return (counts * self.loss_weights).sum(dtype=torch.float64)
