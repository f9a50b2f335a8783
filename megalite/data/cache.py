"""Index arrays kept on disk, found again by what they were made from.

    FOLDER/KEY/         KEY: SHA-256 of what decides the arrays, as canonical JSON; no path, so data may move
        NAME.raw        one per array: its elements in row-major order
        manifest.json   what the arrays were made from; shape, dtype and SHA-256 of each

An entry is complete or absent: written aside, synced, renamed. It is verified each time it is read; one that
fails is built again, with a warning. Builders may race, on one node or many: all make the same arrays, the
first to rename publishes, the others use what it published. Nobody waits for anybody.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.error import DataError
from megalite.data.token_file import open_bytes
from megalite.files import aside_of, folder_aside, sync

VERSION = 1  # of the arrays as well: another order of samples must not find the former one
MANIFEST = "manifest.json"

Arrays = dict[str, np.ndarray]


class IndexCache:
    """The entries of one folder, which is made when needed. Where it cannot be written, nothing is kept.

    It counts what `get` found (num_found), had to build (num_built), and kept of that (num_kept).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.num_found = self.num_built = self.num_kept = 0

    def get(self, made_from: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays that `build` makes, mapped from disk where they are kept.

        made_from: all that decides the arrays, JSON-able.
        """
        made_from = {"version": VERSION, **made_from}
        entry = self.folder / hashlib.sha256(_canonical(made_from).encode()).hexdigest()
        arrays = self._find(entry, made_from)
        if arrays is not None:
            self.num_found += 1
            return arrays
        self.num_built += 1
        return self._keep(entry, made_from, build())

    def _find(self, entry: Path, made_from: dict[str, Any]) -> Arrays | None:
        try:
            return _read(entry, made_from) if entry.exists() else None
        except DataError as error:
            _warn(f"{error}: built again")
            return None

    def _keep(self, entry: Path, made_from: dict[str, Any], arrays: Arrays) -> Arrays:
        """Publish an entry; returns it mapped, or the arrays as they are when that fails."""
        try:
            _publish(entry, made_from, arrays)
            kept = _read(entry, made_from)
        except (OSError, DataError) as error:
            _warn(f"{self.folder}: index cache: {error}: the index is kept in memory only")
            return arrays
        self.num_kept += 1
        return kept


def _publish(entry: Path, made_from: dict[str, Any], arrays: Arrays) -> None:
    """Write an entry, unless a faster builder has published it by then."""
    try:
        with folder_aside(entry) as aside:
            _write(aside, made_from, arrays)
            _make_room(entry, made_from)
    except OSError:
        if not entry.exists():
            raise


def _make_room(entry: Path, made_from: dict[str, Any]) -> None:
    """Remove an entry that is damaged: a rename to its name would be refused."""
    try:
        if entry.exists():
            _read(entry, made_from)
    except DataError:
        shutil.rmtree(entry.rename(aside_of(entry)), ignore_errors=True)


def _write(folder: Path, made_from: dict[str, Any], arrays: Arrays) -> None:
    facts = {}
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        _write_file(folder / f"{name}.raw", data)
        digest = hashlib.sha256(data).hexdigest()
        facts[name] = {"shape": list(array.shape), "dtype": array.dtype.str, "sha256": digest}
    manifest = {"made_from": made_from, "arrays": facts}
    _write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _write_file(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        sync(file)


def _read(entry: Path, made_from: dict[str, Any]) -> Arrays:
    """The arrays of an entry; DataError when anything about it is not as it was written."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        if _canonical(manifest["made_from"]) != _canonical(made_from):
            raise DataError(f"{MANIFEST} describes other data")
        return {name: _read_array(entry / f"{name}.raw", facts) for name, facts in manifest["arrays"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{entry}: index cache: expected an intact entry, found: {error}") from error


def _read_array(path: Path, facts: dict[str, Any]) -> np.ndarray:
    data = open_bytes(path)
    digest = hashlib.sha256(data.data).hexdigest()
    if digest != facts["sha256"]:
        raise DataError(f"{path.name} with SHA-256 {digest}, expected {facts['sha256']}")
    return data.view(facts["dtype"]).reshape(facts["shape"])


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)
