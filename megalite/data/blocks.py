"""Blocks: parts of an input, small enough to hand to a worker, which turns them into documents."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol

from megalite.data.compression import decompressed
from megalite.data.documents import Documents

Keys = tuple[str, ...]
_PIECE_BYTES = 1 << 16


class Block(Protocol):
    """A part of the input `name`: `num_bytes` of it, for progress; `unit` is what a record is called."""

    unit: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def describe(self, record: int) -> str:
        """Where a record stands that counts from 1 at the start of the block."""
        ...

    def read(self, keys: Keys, max_bytes: int) -> Documents:
        """The documents; a record of more than `max_bytes`, or without text under each key, is left out."""
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

    def read(self, keys: Keys, max_bytes: int) -> Documents:
        """The documents of the range."""
        return _parse_lines(self._lines(max_bytes), keys, max_bytes)

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

    def read(self, keys: Keys, max_bytes: int) -> Documents:
        """The documents of the lines."""
        return _parse_lines(self.lines, keys, max_bytes)


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

    def read(self, keys: Keys, max_bytes: int) -> Documents:
        """The documents of the rows."""
        found = Documents([[] for _ in keys])
        for row in zip(*self.columns, strict=True):
            try:
                found.add([_decode(value, key, max_bytes) for value, key in zip(row, keys, strict=True)])
            except ValueError as error:
                found.leave_out(str(error))
        return found


@dataclass(frozen=True)
class TextFile:
    """A whole file that is one document, whatever the keys are."""

    unit: ClassVar[str] = "document"
    name: str
    num_bytes: int

    def describe(self, record: int) -> str:
        """The file."""
        return self.name

    def read(self, keys: Keys, max_bytes: int) -> Documents:
        """The one document."""
        found = Documents([[] for _ in keys])
        path = Path(self.name)
        with path.open("rb") as raw, decompressed(raw, path) as file:
            content = file.read(max_bytes + 1)
        try:
            found.add([_decode(content, "text", max_bytes).removeprefix("\ufeff")] * len(keys))
        except ValueError as error:
            found.leave_out(str(error))
        return found


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


def _parse_lines(lines: Iterable[bytes | None], keys: Keys, max_bytes: int) -> Documents:
    found = Documents([[] for _ in keys])
    for line in lines:
        try:
            if line is None:
                raise ValueError(_too_long(max_bytes))
            if line.strip():
                found.add(parse_record(line, keys))
            else:
                found.num_records += 1
        except ValueError as error:
            found.leave_out(str(error))
    return found


def parse_record(line: bytes, keys: Keys) -> list[str]:
    """The texts under `keys` of a JSON object. Raises ValueError that says why there are none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return [_text_under(key, record) for key in keys]


def _text_under(key: str, record: dict[str, object]) -> str:
    if key not in record:
        names = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"no key {key!r}; keys are {names[:200]}: see --json-key")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"key {key!r}: expected text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which no tokenizer takes
        raise ValueError(f"key {key!r}: half a surrogate pair at character {error.start}") from None
    return text


def _decode(value: bytes | None, key: str, max_bytes: int) -> str:
    if value is None:
        raise ValueError(f"key {key!r}: expected text, found nothing")
    if len(value) > max_bytes:
        raise ValueError(_too_long(max_bytes))
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def _too_long(max_bytes: int) -> str:
    return f"more than {max_bytes:,} bytes: cut it into documents, or raise --max-record-mib"
