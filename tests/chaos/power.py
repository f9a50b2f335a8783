"""What a power cut takes from a disk: contents that were not synced, names whose folder was not.

Processes that die leave all that they have written; so a journal of each is kept aside, from which follows
what the disk might not have had.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.chaos.operations import Operation, identity


class Journal:
    """What a process asks of the disk; give `before` and `after` to `operations.watched`."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def before(self, operation: Operation) -> None:
        if operation.kind == "write":
            self._note("dirty", identity(operation.path))

    def after(self, operation: Operation) -> None:
        if operation.kind == "open":
            self._note("dirty", identity(operation.path))
        elif operation.kind == "fsync":
            self._note("synced", identity(operation.path))
        elif operation.kind == "rename" and operation.target is not None:
            moved = [str(operation.path), str(operation.target)]
            self._note("renamed", identity(operation.target.parent), *moved)

    def _note(self, *entry: Any) -> None:
        os.write(self._descriptor, json.dumps([time.monotonic_ns(), *entry]).encode() + b"\n")


def not_on_disk(journals: Iterable[Path]) -> tuple[set[int], list[tuple[Path, Path]]]:
    """Files whose content, and renames whose name, a disk may not have: identities, and (source, target)."""
    entries = sorted(json.loads(line) for file in journals for line in file.read_text().splitlines())
    dirty: set[int] = set()
    renamed: list[tuple[int, Path, Path]] = []
    for _, kind, number, *moved in entries:
        if kind == "dirty":
            dirty.add(number)
        elif kind == "renamed":
            renamed.append((number, *map(Path, moved)))
        else:
            dirty.discard(number)
            renamed = [rename for rename in renamed if rename[0] != number]
    return dirty, [(source, target) for _, source, target in renamed]


def cut_contents(root: Path, journals: Iterable[Path], kind: str) -> list[Path]:
    """Take the content of files below `root` that were not synced; those files. kind: see `spoil`."""
    dirty, _ = not_on_disk(journals)
    lost = [path for path in sorted(root.rglob("*")) if path.is_file() and identity(path) in dirty]
    for path in lost:
        spoil(path, kind)
    return lost


def cut_names(journals: Iterable[Path]) -> list[Path]:
    """Undo renames that were not synced, the last first; the names that are there again."""
    undone = []
    for source, target in reversed(not_on_disk(journals)[1]):
        if target.exists() and not source.exists():
            target.rename(source)
            undone.append(source)
    return undone


def spoil(path: Path, kind: str, place: float = 0.5) -> bool:
    """Damage a file: cut it off, fill it with zeros from a place on, empty it, remove it, flip one bit.

    place: from 0 to 1 of its length. Whether it is another one now: zeros may have been there before.
    """
    before = path.read_bytes()
    size_bytes = len(before)
    offset = min(int(place * size_bytes), max(0, size_bytes - 1))
    if kind == "missing":
        path.unlink()
    elif kind in ("truncated", "empty"):
        os.truncate(path, 0 if kind == "empty" else offset)
    else:
        content = bytearray(before)
        if kind == "zeros":
            content[offset:] = bytes(len(content) - offset)
        else:
            assert kind == "flipped", kind
            content[offset : offset + 1] = [byte ^ 16 for byte in content[offset : offset + 1]]
        path.write_bytes(content)
    return not path.exists() or path.read_bytes() != before
