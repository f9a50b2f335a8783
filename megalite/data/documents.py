"""Texts to token ids: what a block of input holds, and what a tokenizer makes of it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megalite.data.error import DataError
from megalite.data.indexed_writer import check_ids


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass
class Documents:
    """What a block holds: texts, the number of records in it, and (record, reason) of each one left out.

    Records count from 1 at the start of the block. `texts[k]` are the texts under key k, one for each
    document; `records` holds the record of each document.
    """

    texts: list[list[str]]
    records: list[int] = field(default_factory=list)
    num_records: int = 0
    bad_records: list[tuple[int, str]] = field(default_factory=list)

    def add(self, texts: Sequence[str]) -> None:
        """The next record, with its text under each key."""
        self.num_records += 1
        self.records.append(self.num_records)
        for column, text in zip(self.texts, texts, strict=True):
            column.append(text)

    def leave_out(self, reason: str) -> None:
        """The next record, which is not read."""
        self.num_records += 1
        self.bad_records.append((self.num_records, reason))


def encode_documents(
    texts: list[str],
    encoder: Encoder,
    dtype: np.dtype,
    append_eod: bool,
    vocab_size: int,
    names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts back to back, in `dtype`, and their lengths i64 [texts], 0 where there are none.

    With `append_eod` the end-of-text id closes each document that has tokens. Raises DataError naming the
    document (from `names`) and the id when one is not in [0, vocab_size) or does not fit the dtype.
    """
    rows = encoder.encode_batch(texts)
    end = [encoder.eos_token_id] if append_eod else []
    ids = array("q")  # half the time of np.fromiter
    for row in rows:
        ids.fromlist(row)
        if row:
            ids.fromlist(end)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    lengths[lengths > 0] += len(end)
    tokens = np.frombuffer(ids, np.int64)
    limit = min(vocab_size, int(np.iinfo(dtype).max) + 1)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= limit):
        _refuse(tokens, lengths, limit, names)
    return tokens.astype(dtype), lengths


def _refuse(tokens: np.ndarray, lengths: np.ndarray, limit: int, names: Sequence[str]) -> None:
    """Raise DataError for the first document with an id that is not in [0, limit)."""
    ends = np.cumsum(lengths)
    bad = int(np.argmax((tokens < 0) | (tokens >= limit)))
    document = int(np.searchsorted(ends, bad, side="right"))
    check_ids(tokens[bad : bad + 1], limit, names[document])
    raise DataError(f"{names[document]}: token id out of range")  # not reached: check_ids raises
