"""Records with all their columns, one after another, whichever file or library holds them.

    .jsonl .ndjson .json   JSON lines, also compressed; a .json file may be one array
    .parquet               rows
    a folder, hf:NAME, hf:NAME:SPLIT   rows that the `datasets` library finds there

A source is told apart from others by its content, wherever it lies.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.data.compression import decompressed, plain_suffix
from megalite.data.error import DataError
from megalite.data.input_block import read_line
from megalite.data.sources import MAX_TEXT_BYTES
from megalite.data.tables import HUB, errors_name, open_dataset
from megalite.error import UnusableRecordError

_JSON = (".jsonl", ".ndjson", ".json")
_ROWS_AT_ONCE = 64

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | UnusableRecordError]]


class RowSource(ABC):
    """The records of one input: where each stands, and its columns, or why it has none."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def rows(self) -> Rows:
        """All records, in order. Raises DataError when the input cannot be read."""

    @abstractmethod
    def _files(self) -> Sequence[Path]:
        """The files that hold the content, in an order that does not depend on where they lie."""

    @cached_property
    def content_sha256(self) -> str:
        """What tells the content apart from any other."""
        digest = hashlib.sha256()
        for path in self._files():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class JsonSource(RowSource):
    """A file of JSON lines, or of one array of objects."""

    def rows(self) -> Rows:
        """Blank lines are no records."""
        path = Path(self.name)
        with path.open("rb") as raw, decompressed(raw, path) as file, errors_name(self.name, "JSON"):
            number, line = 1, read_line(file, MAX_TEXT_BYTES)
            if line is not None and line.lstrip()[:1] == b"[":
                yield from self._array(line + file.read())
                return
            while line != b"":
                if line is None or line.strip():
                    yield f"{self.name} line {number}", _parse(line)
                number, line = number + 1, read_line(file, MAX_TEXT_BYTES)

    def _array(self, content: bytes) -> Rows:
        for number, record in enumerate(json.loads(content), 1):
            yield f"{self.name} record {number}", _columns(record)

    def _files(self) -> Sequence[Path]:
        return [Path(self.name)]


class ParquetSource(RowSource):
    """A Parquet file."""

    def rows(self) -> Rows:
        """Rows, some at a time."""
        import pyarrow.parquet

        with errors_name(self.name, "Parquet"):
            file = pyarrow.parquet.ParquetFile(self.name, page_checksum_verification=True)
            batches = file.iter_batches(_ROWS_AT_ONCE, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{self.name} row {number}", _columns(row)) for number, row in enumerate(rows, 1))

    def _files(self) -> Sequence[Path]:
        return [Path(self.name)]


class DatasetSource(RowSource):
    """A split of what the `datasets` library finds in a folder or under a name, kept in its own cache."""

    def rows(self) -> Rows:
        """Rows, one at a time."""
        with errors_name(self.name, "dataset"):
            for number, row in enumerate(self._dataset, 1):
                yield f"{self.name} row {number}", _columns(row)

    def _files(self) -> Sequence[Path]:
        return [Path(entry["filename"]) for entry in self._dataset.cache_files]

    @cached_property
    def _dataset(self) -> Any:
        name, split = self.name.removeprefix(HUB), "train"
        if self.name.startswith(HUB):
            name, _, named = name.partition(":")
            split = named or split
        with errors_name(self.name, "dataset"):
            return open_dataset(name, None, split, streaming=False)


def open_rows(name: str) -> RowSource:
    """The records that `name` stands for. Raises DataError when there are none, or of another kind."""
    path = Path(name)
    if name.startswith(HUB) or path.is_dir():
        return DatasetSource(name)
    if not path.is_file():
        hint = "a name on the Hugging Face Hub is written hf:NAME or hf:NAME:SPLIT"
        raise DataError(f"{name}: expected a file or a folder, found nothing: {hint}")
    kind = plain_suffix(path)
    if kind == ".parquet":
        return ParquetSource(name)
    if kind not in _JSON:
        raise DataError(
            f"{name}: expected JSON lines or Parquet, found {kind or 'no suffix'}: convert it first"
        )
    return JsonSource(name)


def _parse(line: bytes | None) -> Row | UnusableRecordError:
    if line is None:
        return UnusableRecordError("too large", f"more than {MAX_TEXT_BYTES:,} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # JSON can hold half a surrogate pair, which no tokenizer takes
            json.dumps(record, ensure_ascii=False).encode()
        return _columns(record)
    except (ValueError, RecursionError) as error:
        return UnusableRecordError("not JSON", " ".join(str(error).split()))


def _columns(record: object) -> Row | UnusableRecordError:
    """The columns that say something: tables fill absent ones with None."""
    if not isinstance(record, dict):
        return UnusableRecordError("not a JSON object", f"found {type(record).__name__}")
    return {key: value for key, value in record.items() if value is not None}
