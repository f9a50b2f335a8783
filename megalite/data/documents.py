"""Text files to documents, in chunks that workers read for themselves.

`.jsonl`, `.ndjson` and `.json` hold one JSON object per line, each a document; any other text file is one
document. Everything is UTF-8. A chunk is a byte range of a file, and a line belongs to the chunk in which it
begins: memory stays flat, and chunks may be read in any order, by any process.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from megalite.data.error import DataError
from megalite.data.indexed_writer import check_ids

JSON_LINES = (".jsonl", ".ndjson", ".json")
NOT_TEXT = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".parquet", ".arrow", ".bin", ".idx", ".npy")


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Chunk:
    """Bytes [start, end) of a file."""

    path: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the range."""
        return self.end - self.start

    def describe_line(self, line: int) -> str:
        """Where line `line` of the chunk stands; how many lines lie before the chunk is not known here."""
        return f"{self.path} line {line}" + (f" from byte {self.start} on" if self.start else "")


@dataclass
class Documents:
    """What a chunk holds: texts, the number of lines it spans, and (line, reason) of each record left out.

    Lines count from 1 at the start of the chunk; `lines` holds that of each text.
    """

    texts: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    num_lines: int = 0
    bad_records: list[tuple[int, str]] = field(default_factory=list)


def is_json_lines(path: Path) -> bool:
    """Whether each line of the file is a document of its own."""
    return path.suffix.lower() in JSON_LINES


def split_files(paths: Iterable[Path], chunk_bytes: int = 1 << 20) -> Iterator[Chunk]:
    """Chunks of all files, in order; a plain text file is one chunk."""
    for path in paths:
        size = path.stat().st_size
        step = chunk_bytes if is_json_lines(path) else max(size, 1)
        for start in range(0, max(size, 1), step):
            yield Chunk(path, start, min(start + step, size))


def check_files(paths: Iterable[Path]) -> None:
    """Raise DataError for a file that is missing or of a kind that is not read."""
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path}: input: expected a file, found {'a folder' if path.is_dir() else 'nothing'}"
            )
        if path.suffix.lower() in NOT_TEXT:
            raise DataError(
                f"{path}: input: expected JSON lines or plain text, found {path.suffix}: unpack it first"
            )


def read_documents(chunk: Chunk, json_key: str) -> Documents:
    """The documents of a chunk. Raises DataError for a plain text file that is not UTF-8."""
    if is_json_lines(chunk.path):
        return _read_json_lines(chunk, json_key)
    try:
        return Documents([chunk.path.read_bytes().decode("utf-8-sig")], [1], 1)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{chunk.path}: text: expected UTF-8, found another byte at offset {error.start}"
        ) from error


def _read_json_lines(chunk: Chunk, json_key: str) -> Documents:
    found = Documents()
    for line in _lines(chunk):
        found.num_lines += 1
        if not line.strip():
            continue
        try:
            text = _parse_record(line, json_key)
        except ValueError as error:
            found.bad_records.append((found.num_lines, _reason(error)))
        else:
            found.texts.append(text)
            found.lines.append(found.num_lines)
    return found


def _lines(chunk: Chunk) -> Iterator[bytes]:
    """Lines that begin within the chunk."""
    with chunk.path.open("rb") as file:
        position = chunk.start
        if position:  # a line begins here only when the byte before ends one
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < chunk.end and (line := file.readline()):
            position += len(line)
            yield line


def _parse_record(line: bytes, json_key: str) -> str:
    record = json.loads(line.decode("utf-8-sig"))
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if json_key not in record:
        raise ValueError(
            f"no key {json_key!r}; keys are {', '.join(map(repr, record)) or 'none'}: see --json-key"
        )
    text = record[json_key]
    if not isinstance(text, str):
        raise ValueError(f"key {json_key!r}: expected text, found {type(text).__name__}")
    text.encode("utf-8")  # JSON can hold half a surrogate pair, which no tokenizer takes
    return text


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"half a surrogate pair at character {error.start}"
    return f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


def encode_documents(
    texts: list[str], encoder: Encoder, dtype: np.dtype, append_eod: bool, vocab_size: int, names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts back to back, in `dtype`, and their lengths i64 [texts], 0 where there are none.

    With `append_eod` the end-of-text id closes each document that has tokens. Raises DataError naming the
    document (from `names`) and the id when one is not in [0, vocab_size) or does not fit the dtype.
    """
    rows = encoder.encode_batch(texts)
    if append_eod:
        rows = [[*row, encoder.eos_token_id] if row else row for row in rows]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    tokens = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    limit = min(vocab_size, int(np.iinfo(dtype).max) + 1)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= limit):
        for name, row in zip(names, rows, strict=True):
            check_ids(np.array(row, np.int64), limit, name)
    return tokens.astype(dtype), lengths
