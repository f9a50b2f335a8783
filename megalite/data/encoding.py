"""Texts to token ids: what a tokenizer makes of a block of input."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from megalite.data.input_block import InputBlock
from megalite.data.token_ids import check_ids


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


class EncoderSource(Protocol):
    """Where a tokenizer comes from: small, hashable, and sent to each worker, which loads it."""

    def load(self) -> Encoder: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class EncodingPlan:
    """How blocks become ids; the same for all workers.

    With `append_eod` the end-of-text id closes each document that has tokens. An id that is not in
    [0, vocab_size), or does not fit `dtype`, is an error.
    """

    tokenizer: EncoderSource
    keys: tuple[str, ...]
    append_eod: bool
    vocab_size: int
    dtype: np.dtype
    max_record_bytes: int


@dataclass
class Encoded:
    """What became of a block: per key, ids back to back and document lengths; and what was left out."""

    rows: list[tuple[np.ndarray, np.ndarray]]
    num_records: int
    bad_records: list[tuple[int, str]]


def encode_block(plan: EncodingPlan, block: InputBlock) -> Encoded:
    """Read the records of a block and encode their texts. Raises DataError for an id that is not allowed."""
    found, encoder = block.read(plan.keys, plan.max_record_bytes), load_encoder(plan.tokenizer)

    def name(text: int) -> str:
        return block.describe(found.numbers[text])

    rows = [encode_texts(texts, encoder, plan, name) for texts in found.texts]
    return Encoded(rows, found.num_records, found.bad_records)


@cache
def load_encoder(tokenizer: EncoderSource) -> Encoder:
    """The tokenizer, loaded once per process."""
    return tokenizer.load()


def encode_texts(
    texts: list[str], encoder: Encoder, plan: EncodingPlan, name: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all texts back to back, in the plan's dtype, and their lengths i64 [texts], 0 without tokens.

    Raises DataError with the `name` of the text for an id that the plan does not allow.
    """
    rows = encoder.encode_batch(texts)
    end = [encoder.eos_token_id] if plan.append_eod else []
    ids = array("q")  # half the time of np.fromiter
    for row in rows:
        ids.fromlist(row)
        if row:
            ids.fromlist(end)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    lengths[lengths > 0] += len(end)
    tokens = np.frombuffer(ids, np.int64)
    limit = min(plan.vocab_size, int(np.iinfo(plan.dtype).max) + 1)
    check_ids(tokens, limit, lambda at: name(int(np.searchsorted(np.cumsum(lengths), at, side="right"))))
    return tokens.astype(plan.dtype), lengths
