"""Inputs of preprocessing, cut into blocks.

    .jsonl .ndjson .json   JSON lines, each a document; a plain file is cut into byte ranges
    .parquet               rows, each a document
    a folder, hf:NAME      rows that the `datasets` library finds there
    any other file         text, one document

Text and JSON lines may be compressed. Memory stays flat: workers read plain files for themselves; all else is
read once, from beginning to end, in small blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from megalite.data.compression import decompressed, is_compressed, plain_suffix
from megalite.data.error import DataError
from megalite.data.input_block import InputBlock, LineRange, Lines, Rows, TextFile, read_line
from megalite.data.tables import HUB, Columns, HubTable, ParquetTable

BLOCK_BYTES = 1 << 18
MAX_TEXT_BYTES = 1 << 26  # of a record that is read whole, to learn from
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_NOT_TEXT = (
    ".xz", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".bin", ".idx", ".npy", ".ds", ".pt", ".safetensors",
)  # fmt: skip


class Source(Protocol):
    """One input; `num_bytes` is None when its size is not known before it has been read."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int | None: ...

    def blocks(self, max_bytes: int) -> Iterator[InputBlock]:
        """All of it, in order; records of more than `max_bytes` are not kept in memory."""
        ...


@dataclass(frozen=True)
class PlainLines:
    """A plain file of JSON lines."""

    name: str
    num_bytes: int

    def blocks(self, max_bytes: int) -> Iterator[InputBlock]:
        """Byte ranges, which workers read."""
        for start in range(0, self.num_bytes, BLOCK_BYTES):
            yield LineRange(self.name, min(BLOCK_BYTES, self.num_bytes - start), start)


@dataclass(frozen=True)
class CompressedLines:
    """A compressed file of JSON lines; `num_bytes` is its size as it is."""

    name: str
    num_bytes: int

    def blocks(self, max_bytes: int) -> Iterator[InputBlock]:
        """Lines, decompressed here: a tokenizer is far slower than that."""
        lines: list[bytes | None] = []
        size = read = before = 0
        path = Path(self.name)
        with path.open("rb") as raw, decompressed(raw, path) as file:
            while (line := read_line(file, max_bytes)) != b"":
                lines.append(line)
                size += len(line or b"")
                if size >= BLOCK_BYTES:
                    yield Lines(self.name, raw.tell() - read, before, lines)
                    before, read = before + len(lines), raw.tell()
                    lines, size = [], 0
        yield Lines(self.name, self.num_bytes - read, before, lines)


@dataclass(frozen=True)
class PlainText:
    """A text file, one document; `num_bytes` is its size as it is, compressed or not."""

    name: str
    num_bytes: int

    def blocks(self, max_bytes: int) -> Iterator[InputBlock]:
        """One block."""
        yield TextFile(self.name, self.num_bytes)


@dataclass(frozen=True)
class Table:
    """A table whose rows are documents."""

    name: str
    num_bytes: int | None
    table: ParquetTable | HubTable
    num_rows: int | None = None

    def blocks(self, max_bytes: int) -> Iterator[InputBlock]:
        """Rows in groups. A group's share of the input is by its number of rows, or by its own size."""
        before = 0
        for columns in _grouped(self.table.read()):
            if self.num_bytes is None:
                share = sum(len(text or b"") for column in columns for text in column)
            else:
                share = self.num_bytes * len(columns[0]) // (self.num_rows or 1)
            yield Rows(self.name, share, before, columns)
            before += len(columns[0])


def total_bytes(sources: Sequence[Source]) -> int | None:
    """Size of all inputs together, where it is known."""
    sizes = [source.num_bytes for source in sources]
    return None if None in sizes else sum(size or 0 for size in sizes)


def find_source(name: str, keys: tuple[str, ...], subset: str | None = None, split: str = "train") -> Source:
    """The input that `name` stands for; `subset` and `split` are for folders and hf:NAME.

    Raises DataError when there is none, or it is of a kind that is not read.
    """
    path = Path(name)
    if name.startswith(HUB) or path.is_dir():
        return Table(name, None, HubTable(name, subset, split, keys))
    if not path.is_file():
        hint = "a name on the Hugging Face Hub is written hf:NAME"
        raise DataError(f"{name}: input: expected a file or a folder, found nothing: {hint}")
    size, kind = path.stat().st_size, plain_suffix(path)
    if kind in _NOT_TEXT:
        raise DataError(
            f"{name}: input: expected JSON lines, Parquet or text, found {kind}: convert it first"
        )
    if kind == ".parquet":
        table = ParquetTable(path, keys)
        return Table(name, size, table, table.num_rows)
    if kind not in _JSON_LINES:
        return PlainText(name, size)
    return CompressedLines(name, size) if is_compressed(path) else PlainLines(name, size)


def read_texts(sources: Sequence[Source], key: str, max_bytes: int | None = None) -> Iterator[str]:
    """The texts under `key` of all inputs with progress, until `max_bytes` of input.

    Raises DataError for a record without text.
    """
    total = min(filter(None, (total_bytes(sources), max_bytes)), default=None)
    blocks = (block for source in sources for block in source.blocks(MAX_TEXT_BYTES))
    with tqdm(total=total, desc="read", unit="B", unit_scale=True) as bar:
        for block in blocks:
            if max_bytes is not None and bar.n >= max_bytes:
                return
            found = block.read((key,), MAX_TEXT_BYTES)
            for record, reason in found.bad_records[:1]:
                raise DataError(f"{block.describe(record)}: {reason}")
            yield from found.texts[0]
            bar.update(block.num_bytes)


def _grouped(pieces: Iterator[Columns]) -> Iterator[Columns]:
    """The same rows in groups of about BLOCK_BYTES."""
    rows: list[tuple[bytes | None, ...]] = []
    size = 0
    for columns in pieces:
        for row in zip(*columns, strict=True):
            rows.append(row)
            size += sum(len(text or b"") for text in row)
            if size >= BLOCK_BYTES:
                yield [list(column) for column in zip(*rows, strict=True)]
                rows, size = [], 0
    if rows:
        yield [list(column) for column in zip(*rows, strict=True)]
