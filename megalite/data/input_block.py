"""Parts of an input, small enough to hand to a worker, which reads their records."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from megalite.data.compression import decompressed
from megalite.data.records import Keys, RecordError, Records, decode, parse_line

_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class InputBlock(ABC):
    """A part of the input `name`: `num_bytes` of it, for progress; `unit` is the word for a record."""

    unit: ClassVar[str]
    name: str
    num_bytes: int

    @abstractmethod
    def describe(self, record: int) -> str:
        """Where a record stands that counts from 1 at the start of the block."""

    @abstractmethod
    def _rows(self, max_bytes: int) -> Iterable[Any]:
        """What each record is made of; not more than `max_bytes` of one are kept in memory."""

    @abstractmethod
    def _texts(self, row: Any, keys: Keys, max_bytes: int) -> list[str] | None:
        """A record's text under each key, None when it is blank. Raises RecordError when it is a bad one."""

    def read(self, keys: Keys, max_bytes: int) -> Records:
        """The records; one of more than `max_bytes`, or without text under each key, is left out."""
        found = Records([[] for _ in keys])
        for row in self._rows(max_bytes):
            found.num_records += 1
            try:
                texts = self._texts(row, keys, max_bytes)
            except RecordError as error:
                found.bad_records.append((found.num_records, str(error)))
            else:
                found.add(texts)
        return found


class _JsonLines(InputBlock):
    unit = "line"

    def _texts(self, row: bytes | None, keys: Keys, max_bytes: int) -> list[str] | None:
        return parse_line(row, keys, max_bytes)


@dataclass(frozen=True)
class LineRange(_JsonLines):
    """The JSON lines that begin in `num_bytes` from `start` of a plain file; the next range has the next."""

    start: int

    def describe(self, record: int) -> str:
        """How many lines lie before the range is not known here."""
        return f"{self.name} line {record}" + (f" from byte {self.start} on" if self.start else "")

    def _rows(self, max_bytes: int) -> Iterator[bytes | None]:
        end = self.start + self.num_bytes
        with Path(self.name).open("rb") as file:
            if self.start:  # a line begins at `start` only when the byte before ends one
                file.seek(self.start - 1)
                _skip_line(file, end)
            while file.tell() < end and (line := read_line(file, max_bytes)) != b"":
                yield line


@dataclass(frozen=True)
class Lines(_JsonLines):
    """JSON lines in memory, after `before` others; None stands for one that was too long."""

    before: int
    lines: list[bytes | None]

    def describe(self, record: int) -> str:
        """Line number in the file."""
        return f"{self.name} line {self.before + record}"

    def _rows(self, max_bytes: int) -> list[bytes | None]:
        return self.lines


@dataclass(frozen=True)
class Rows(InputBlock):
    """Rows of a table, after `before` others: the UTF-8 text, or None, under each key."""

    unit = "row"
    before: int
    columns: list[list[bytes | None]]

    def describe(self, record: int) -> str:
        """Row number in the table."""
        return f"{self.name} row {self.before + record}"

    def _rows(self, max_bytes: int) -> Iterable[tuple[bytes | None, ...]]:
        return zip(*self.columns, strict=True)

    def _texts(self, row: tuple[bytes | None, ...], keys: Keys, max_bytes: int) -> list[str]:
        return [decode(value, key, max_bytes) for value, key in zip(row, keys, strict=True)]


@dataclass(frozen=True)
class TextFile(InputBlock):
    """A whole file that is one document, whatever the keys are."""

    unit = "document"

    def describe(self, record: int) -> str:
        """The file."""
        return self.name

    def _rows(self, max_bytes: int) -> list[bytes]:
        path = Path(self.name)
        with path.open("rb") as raw, decompressed(raw, path) as file:
            return [file.read(max_bytes + 1)]

    def _texts(self, row: bytes, keys: Keys, max_bytes: int) -> list[str]:
        return [decode(row, "text", max_bytes).removeprefix("\ufeff")] * len(keys)


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
