"""Parts of an input, small enough to hand to a worker, which reads their records."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol

from megalite.data.compression import decompressed
from megalite.data.records import Keys, Records, decode, parse_line, read_records

_PIECE_BYTES = 1 << 16


class InputBlock(Protocol):
    """A part of the input `name`: `num_bytes` of it, for progress; `unit` is what a record is called."""

    unit: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def describe(self, record: int) -> str:
        """Where a record stands that counts from 1 at the start of the block."""
        ...

    def read(self, keys: Keys, max_bytes: int) -> Records:
        """The records; one of more than `max_bytes`, or without text under each key, is left out."""
        ...


@dataclass(frozen=True)
class LineRange:
    """The JSON lines that begin in bytes [start, end) of a plain file: adjacent ranges share no line."""

    unit: ClassVar[str] = "line"
    name: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the range."""
        return self.end - self.start

    def describe(self, record: int) -> str:
        """How many lines lie before the range is not known here."""
        return f"{self.name} line {record}" + (f" from byte {self.start} on" if self.start else "")

    def read(self, keys: Keys, max_bytes: int) -> Records:
        """The records of the range."""
        return read_records(self._lines(max_bytes), keys, lambda line: parse_line(line, keys, max_bytes))

    def _lines(self, max_bytes: int) -> Iterator[bytes | None]:
        with Path(self.name).open("rb") as file:
            if self.start:  # a line begins at `start` only when the byte before ends one
                file.seek(self.start - 1)
                _skip_line(file, self.end)
            while file.tell() < self.end and (line := read_line(file, max_bytes)) != b"":
                yield line


@dataclass(frozen=True)
class Lines:
    """JSON lines in memory, after `before` others; None stands for one that was too long."""

    unit: ClassVar[str] = "line"
    name: str
    num_bytes: int
    before: int
    lines: list[bytes | None]

    def describe(self, record: int) -> str:
        """Line number in the file."""
        return f"{self.name} line {self.before + record}"

    def read(self, keys: Keys, max_bytes: int) -> Records:
        """The records of the lines."""
        return read_records(self.lines, keys, lambda line: parse_line(line, keys, max_bytes))


@dataclass(frozen=True)
class Rows:
    """Rows of a table, after `before` others: the UTF-8 text, or None, under each key."""

    unit: ClassVar[str] = "row"
    name: str
    num_bytes: int
    before: int
    columns: list[list[bytes | None]]

    def describe(self, record: int) -> str:
        """Row number in the table."""
        return f"{self.name} row {self.before + record}"

    def read(self, keys: Keys, max_bytes: int) -> Records:
        """The records of the rows."""

        def texts_of(row: tuple[bytes | None, ...]) -> list[str]:
            return [decode(value, key, max_bytes) for value, key in zip(row, keys, strict=True)]

        return read_records(zip(*self.columns, strict=True), keys, texts_of)


@dataclass(frozen=True)
class TextFile:
    """A whole file that is one document, whatever the keys are."""

    unit: ClassVar[str] = "document"
    name: str
    num_bytes: int

    def describe(self, record: int) -> str:
        """The file."""
        return self.name

    def read(self, keys: Keys, max_bytes: int) -> Records:
        """The one record."""
        path = Path(self.name)
        with path.open("rb") as raw, decompressed(raw, path) as file:
            content = file.read(max_bytes + 1)

        def texts_of(content: bytes) -> list[str]:
            return [decode(content, "text", max_bytes).removeprefix("\ufeff")] * len(keys)

        return read_records([content], keys, texts_of)


def read_line(file: BinaryIO, max_bytes: int) -> bytes | None:
    """The next line with its end; b"" at the end of the file; None for a longer line, which is skipped."""
    line = file.readline(max_bytes + 1)
    if len(line) <= max_bytes:
        return line
    while line and not line.endswith(b"\n"):
        line = file.readline(_PIECE_BYTES)
    return None


def _skip_line(file: BinaryIO, end: int) -> None:
    """Move behind the end of the line that stands here, or to `end` when it lies beyond."""
    while (left := end - file.tell()) > 0:
        if not (piece := file.readline(min(left, _PIECE_BYTES))) or piece.endswith(b"\n"):
            return
