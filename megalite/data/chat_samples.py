"""Samples of conversations, of pairs and of single answers, in the order in which a run reads them.

A sample is a row of `seq_length` tokens: whole sequences one after another, then padding. What is learnt of a
sequence are labels, one token on; no label crosses from one sequence to another.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from megalite.batch import IGNORED
from megalite.data.packing import Bins, SampleOrder, draw
from megalite.data.prepared import PreparedSource

PADDING_ID = 0  # any id that every vocabulary has: nothing attends to it and nothing is learnt of it


Kind = Literal["conversations", "pairs", "unpaired"]


def sequences_of(kind: Kind) -> int:
    """In an item: a pair is two."""
    return 2 if kind == "pairs" else 1


class SampleRow(NamedTuple):
    """One row, each [seq_length]: input_ids and labels i64, document_starts i64, padding bool.

    A sequence is a document, and the padding is one more.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_starts: np.ndarray
    padding: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[tuple[np.ndarray, np.ndarray]], seq_length: int) -> "SampleRow":
        """Sequences of ids and whether each is learnt, which together have at most `seq_length` tokens."""
        row = cls(
            np.full(seq_length, PADDING_ID, np.int64),
            np.full(seq_length, IGNORED, np.int64),
            np.empty(seq_length, np.int64),
            np.ones(seq_length, bool),
        )
        start = 0
        for ids, is_learnt in sequences:
            end = start + len(ids)
            row.input_ids[start:end] = ids
            row.labels[start : end - 1] = np.where(is_learnt[1:], ids[1:], IGNORED)
            row.document_starts[start:end] = start
            row.padding[start:end] = False
            start = end
        row.document_starts[start:] = start
        return row


class ChatSamples:
    """Rows by position, drawn from sources of conversations, of pairs, or of answers with a label.

    weights: one per source, or None for all sources as one. count: of samples, None for one epoch.
    kind: of an item; pairs and answers are never packed.

    Attributes: bins, the items of each sample; an item is counted on from source to source.
    """

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        weights: Sequence[float] | None,
        order: SampleOrder,
        count: int | None,
        *,
        kind: Kind = "conversations",
    ) -> None:
        self.sources, self.weights, self.order, self.kind = tuple(sources), weights, order, kind
        self.sequences_per_item = sequences_per_item = sequences_of(kind)
        lengths = [np.asarray(one.tokens.sequence_lengths, np.int64)[::sequences_per_item] for one in sources]
        self._ends = np.cumsum([len(one) for one in lengths])
        self.bins: Bins = draw(lengths, weights, order, count)

    def __len__(self) -> int:
        return self.bins.num_bins

    @property
    def num_items(self) -> int:
        """Conversations or pairs in all sources."""
        return int(self._ends[-1])

    def items(self, position: int) -> np.ndarray:
        """The conversations or the pair of a sample, by number."""
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        return self.bins.bin(position)

    def rows(self, position: int) -> list[SampleRow]:
        """A sample: one row of conversations, or the two rows of a pair, the chosen one first."""
        found = [self._sequences(int(item)) for item in self.items(position)]
        return [SampleRow.of(row, self.order.seq_length) for row in zip(*found, strict=True)]

    def mismatched(self, position: int, other: int) -> SampleRow:
        """The prompt of one single answer with the answer of another, cut at the end where it is too long."""
        prompt, answer = (self._sequences(int(self.items(p)[0]))[0] for p in (position, other))
        cuts = (slice(None, first_learnt(prompt)), slice(first_learnt(answer), None))
        joined = [np.concatenate([of[cuts[0]], to[cuts[1]]]) for of, to in zip(prompt, answer, strict=True)]
        ids, is_learnt = (part[: self.order.seq_length] for part in joined)
        return SampleRow.of([(ids, is_learnt)], self.order.seq_length)

    def is_desirable(self, position: int) -> bool:
        """Whether a sample is an answer to be given, and not one to be avoided."""
        source, index = self._place(int(self.items(position)[0]))
        return source.is_desirable(index)

    @cached_property
    def description(self) -> list[dict[str, Any]]:
        """Per source what decides its samples and their order, for checkpoints."""
        weights = [None] * len(self.sources) if self.weights is None else list(self.weights)
        order = self.order._asdict() | {"sequences_per_item": self.sequences_per_item}
        passes = -(-len(self.bins.members) // self.num_items)
        return [
            {"prefix": source.name, "weight": weight, **source.tokens.fingerprint, **order}
            | {"sha256": source.sha256, "passes": passes}
            for source, weight in zip(self.sources, weights, strict=True)
        ]

    def _sequences(self, item: int) -> list[tuple[np.ndarray, np.ndarray]]:
        source, first = self._place(item)
        return [source.sequence(first + i) for i in range(self.sequences_per_item)]

    def _place(self, item: int) -> tuple[PreparedSource, int]:
        """The source of an item, and its first sequence there."""
        source = int(np.searchsorted(self._ends, item, side="right"))
        first = (item - int(self._ends[source - 1] if source else 0)) * self.sequences_per_item
        return self.sources[source], first


def first_learnt(sequence: tuple[np.ndarray, np.ndarray]) -> int:
    """Where the prompt of a sequence ends."""
    return int(sequence[1].argmax())


class ChatDatasets(NamedTuple):
    """What a run on conversations or pairs reads; None where nothing is validated."""

    train: ChatSamples
    validation: ChatSamples | None = None
