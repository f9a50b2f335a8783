"""Tables of text: Parquet files, and whatever the `datasets` library opens, row by row in flat memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.data.error import DataError

if TYPE_CHECKING:
    import pyarrow

HUB = "hf:"  # before a name on the Hugging Face Hub
Columns = list[list[bytes | None]]  # [keys][rows]
_ROWS_AT_ONCE = 64


class ParquetTable:
    """A Parquet file; page checksums are verified where the file has them.

    Raises DataError when it is damaged or has no text under one of the keys.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        import pyarrow.parquet

        self.path, self.keys = path, keys
        with errors_name(str(path), "Parquet"):
            self._file = pyarrow.parquet.ParquetFile(
                path, buffer_size=1 << 20, page_checksum_verification=True
            )
            self.num_rows = self._file.metadata.num_rows
            _check_columns(str(path), self._file.schema_arrow, keys)

    def read(self) -> Iterator[Columns]:
        """All rows, some at a time."""
        with errors_name(str(self.path), "Parquet"):
            batches = self._file.iter_batches(_ROWS_AT_ONCE, columns=list(self.keys), use_threads=False)
            yield from (_columns(batch, self.keys) for batch in batches)


class HubTable:
    """A split of a dataset that the `datasets` library knows: a name on the Hub, or a folder.

    Raises DataError when it cannot be opened or has no text under one of the keys.
    """

    def __init__(self, name: str, subset: str | None, split: str, keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, keys
        with errors_name(name, "dataset"):
            self._rows = open_dataset(name.removeprefix(HUB), subset, split, streaming=True)

    def read(self) -> Iterator[Columns]:
        """All rows, some at a time."""
        with errors_name(self.name, "dataset"):
            for table in self._rows.with_format("arrow").iter(_ROWS_AT_ONCE):
                _check_columns(self.name, table.schema, self.keys)
                yield _columns(table, self.keys)


class errors_name:  # noqa: N801  a context manager that reads as a verb
    """Turns what a foreign reader raises, of whatever class, into one line that names the input."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"{self.name}: {self.kind}: expected to read it, found: {reason}") from error


def open_dataset(name: str, subset: str | None, split: str, *, streaming: bool) -> Any:
    """What the `datasets` library finds in a folder, also one of save_to_disk, or under a name of the Hub."""
    import datasets

    datasets.disable_progress_bars()
    saved = Path(name, split) if Path(name, "dataset_dict.json").is_file() else Path(name)
    if Path(saved, "state.json").is_file():  # what save_to_disk writes
        whole = datasets.load_from_disk(str(saved))
        return whole.to_iterable_dataset() if streaming else whole
    return datasets.load_dataset(name, subset, split=split, streaming=streaming)


def _check_columns(name: str, schema: "pyarrow.Schema", keys: tuple[str, ...]) -> None:
    from pyarrow import types

    for key in keys:
        if key not in schema.names:
            found = ", ".join(map(repr, schema.names)) or "none"
            raise DataError(f"{name}: no column {key!r}; columns are {found[:200]}: see --json-key")
        kind = schema.field(key).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise DataError(f"{name}: column {key!r}: expected text, found {kind}")


def _columns(table: Any, keys: tuple[str, ...]) -> Columns:
    """Bytes, because a damaged file can hold text that is not UTF-8."""
    import pyarrow

    return [
        table.column(key).cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
        for key in keys
    ]
