"""Records: lines of JSON, rows of a table, whole files; and the texts that they hold."""

import json
from dataclasses import dataclass, field

from megalite.data.error import DataError

Keys = tuple[str, ...]


class RecordError(DataError):
    """Why a record gives no text."""


@dataclass
class Records:
    """What a block of input holds: texts, the number of records in it, and (record, reason) of each bad one.

    Records count from 1 at the start of the block. `texts[k]` are the texts under key k, one per record that
    is not left out; `numbers` says which records those are.
    """

    texts: list[list[str]]
    numbers: list[int] = field(default_factory=list)
    num_records: int = 0
    bad_records: list[tuple[int, str]] = field(default_factory=list)

    def add(self, texts: list[str] | None) -> None:
        """Keep the texts of the record that was counted last; None for a blank one."""
        if texts is not None:
            self.numbers.append(self.num_records)
            for column, text in zip(self.texts, texts, strict=True):
                column.append(text)


def parse_line(line: bytes | None, keys: Keys, max_bytes: int) -> list[str] | None:
    """The texts under `keys` of a JSON object; None for a blank line. line: None if it was too long to keep.

    Raises RecordError that says why there are none.
    """
    if line is None:
        raise RecordError(_too_long(max_bytes))
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise RecordError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, found {type(record).__name__}")
    return [_text_under(key, record) for key in keys]


def _text_under(key: str, record: dict[str, object]) -> str:
    if key not in record:
        names = ", ".join(map(repr, record)) or "none"
        raise RecordError(f"no key {key!r}; keys are {names[:200]}: see --json-key")
    text = record[key]
    if not isinstance(text, str):
        raise RecordError(f"key {key!r}: expected text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which no tokenizer takes
        raise RecordError(f"key {key!r}: half a surrogate pair at character {error.start}") from None
    return text


def decode(value: bytes | None, key: str, max_bytes: int) -> str:
    """The text under `key`. Raises RecordError when there is none, or it is too long, or not UTF-8."""
    if value is None:
        raise RecordError(f"key {key!r}: expected text, found nothing")
    if len(value) > max_bytes:
        raise RecordError(_too_long(max_bytes))
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 at byte {error.start}") from None


def _too_long(max_bytes: int) -> str:
    return f"more than {max_bytes:,} bytes: cut it into documents, or raise --max-record-mib"
