"""Megatron token files, written: complete or absent, in flat memory (12 bytes per document)."""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from megalite.data.error import DataError
from megalite.data.indexed_dataset import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset, bin_path, idx_path
from megalite.data.token_ids import check_ids
from megalite.files import aside_of, sync, written_aside

UINT8, UINT16, INT32 = DTYPES[1], DTYPES[8], DTYPES[4]
_CODES = {UINT8: 1, UINT16: 8, INT32: 4}  # what is written; more is read
_LARGEST_UINT16_VOCABULARY = 65_500  # Megatron's own limit
_MAX_LENGTH = 2**31 - 1  # tokens of one sequence, an i32 in the index
_COPY_TOKENS = 1 << 22


def dtype_for(vocab_size: int) -> np.dtype:
    """u16 for vocabularies below 65,500 ids, else i32: the choice of Megatron's preprocessor."""
    return UINT16 if vocab_size < _LARGEST_UINT16_VOCABULARY else INT32


class IndexedDatasetWriter:
    """Writes P.bin and P.idx under temporary names beside them; leaving the `with` block publishes both.

    An exception in the block discards everything. Both files are synced, an older index is removed, P.bin is
    renamed first and P.idx last: a reader meets the old pair, no pair, or the new pair.

        with IndexedDatasetWriter("corpus_text_document", dtype_for(vocab_size)) as writer:
            writer.add_document([[1, 2, 3, 0]])

    Raises DataError for another dtype than u8, u16 or i32, and for ids that do not fit it.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type = UINT16) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        if self.dtype not in _CODES:
            raise DataError(
                f"{prefix}: dtype: expected uint8, uint16 or int32, found {self.dtype}: no other is written"
            )
        self._limit = int(np.iinfo(self.dtype).max) + 1
        self._lengths, self._boundaries = array("i"), array("q", [0])
        self.num_tokens = 0
        bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._aside = aside_of(bin_path(prefix))
        self._bin = self._aside.open("wb")

    @property
    def num_documents(self) -> int:
        """Documents added so far, empty ones included."""
        return len(self._boundaries) - 1

    def summary(self) -> str:
        """The prefix, and what was written, in one line."""
        counts = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens of {self.dtype}"
        return f"{self.prefix}: {counts}"

    def add_document(self, sequences: Iterable[ArrayLike]) -> None:
        """Append one document made of `sequences`; sequences without tokens are left out."""
        for sequence in sequences:
            ids = np.asarray(sequence)
            if ids.size:
                self._check_length(ids.size)
                self._write(ids, f"{self.prefix}: document {self.num_documents}")
                self._lengths.append(ids.size)
        self._boundaries.append(len(self._lengths))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append many documents of one sequence each: `lengths` [documents] cut `tokens` [their sum]."""
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.size:
            self._check_length(int(lengths.min()))
            self._check_length(int(lengths.max()))
        if lengths.sum() != len(tokens):
            raise DataError(
                f"{self.prefix}: lengths: expected a sum of {len(tokens)} tokens, found {lengths.sum()}"
            )
        self._write(np.asarray(tokens), f"{self.prefix}: documents from {self.num_documents}")
        boundaries = len(self._lengths) + np.cumsum(lengths > 0, dtype=np.int64)
        self._lengths.frombytes(lengths[lengths > 0].astype(np.int32).tobytes())
        self._boundaries.frombytes(boundaries.tobytes())

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of a dataset of the same dtype."""
        if dataset.dtype != self.dtype:
            remedy = "merge datasets of one dtype, or tokenize again"
            raise DataError(
                f"{dataset.prefix}.idx: dtype: expected {self.dtype}, found {dataset.dtype}: {remedy}"
            )
        for start in range(0, dataset.num_tokens, _COPY_TOKENS):
            self._write(dataset.tokens[start : start + _COPY_TOKENS], dataset.prefix)
        boundaries = dataset.document_indices[1:] + len(self._lengths)
        self._lengths.frombytes(dataset.sequence_lengths.tobytes())
        self._boundaries.frombytes(boundaries.tobytes())

    def publish(self) -> None:
        """Sync both files and give them their names; the writer is finished then."""
        sync(self._bin)
        with written_aside(idx_path(self.prefix), "wb") as index:
            self._write_index(index)
            sync(index)  # the old pair may go now
            idx_path(self.prefix).unlink(missing_ok=True)
            self._aside.replace(bin_path(self.prefix))

    def discard(self) -> None:
        """Remove what is not published."""
        self._bin.close()
        self._aside.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.discard()

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= _MAX_LENGTH:
            where = f"{self.prefix}: length of a sequence near document {self.num_documents}"
            raise DataError(
                f"{where}: expected at least 0, found {length}: at most {_MAX_LENGTH} tokens can be indexed"
            )

    def _write(self, ids: np.ndarray, where: str) -> None:
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise DataError(
                f"{where}: ids: expected a flat row of integers, found {ids.dtype} {list(ids.shape)}"
            )
        check_ids(ids, self._limit, where)
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.num_tokens += ids.size

    def _write_index(self, index) -> None:
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        header = (MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(self._boundaries))
        index.write(HEADER.pack(*header))
        index.write(lengths.astype("<i4").data)
        index.write(np.concatenate([np.zeros(1, np.int64), ends])[:-1].astype("<i8").data)
        index.write(np.frombuffer(self._boundaries, np.int64).astype("<i8").data)


def merge_datasets(
    prefixes: Sequence[str | Path], output_prefix: str | Path, progress: bool = False
) -> IndexedDatasetWriter:
    """Write the documents of several datasets of one dtype, in the order given, as one dataset.

    Returns the writer, with what it counted. Raises DataError, and writes nothing, for no dataset, one that
    cannot be opened or has another dtype, and an output that is one of the inputs.
    """
    if not prefixes:
        raise DataError(f"{output_prefix}: parts: expected at least 1 dataset to merge, found 0")
    parts, output = [IndexedDataset(prefix) for prefix in prefixes], bin_path(output_prefix)
    if output.exists() and any(output.samefile(bin_path(part.prefix)) for part in parts):
        raise DataError(f"{output_prefix}: output: expected another name than those of the inputs")
    total = sum(part.num_tokens for part in parts)
    bar = tqdm(total=total, desc="merge", unit="token", unit_scale=True, disable=not progress)
    with IndexedDatasetWriter(output_prefix, parts[0].dtype) as writer, bar:
        for part in parts:
            writer.add_dataset(part)
            bar.update(part.num_tokens)
    return writer
