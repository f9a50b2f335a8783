"""The checkpoints in a folder: each with its size, its age, its state, and what is wrong with it."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.checkpoint.base import Base, base_of
from megalite.checkpoint.damage import Watch, find_damage
from megalite.checkpoint.format import MANIFEST, STATE, CheckpointError, Manifest, folder_step, read_manifest
from megalite.checkpoint.load import checkpoints_at, no_checkpoint
from megalite.files import ASIDE


@dataclass(frozen=True)
class Item:
    """One checkpoint, as far as it can be read.

    Attributes:
        folder: of its step.
        size_bytes: of the files in it.
        saved_at_seconds: since 1970.
        damage: what is wrong with its files, a line each.
        manifest: None when it is damaged itself, or the state is.
        state: of its state.json; empty in the same case.
        base: of adapters, what they were trained on.
        base_damage: what is wrong with that.
    """

    folder: Path
    size_bytes: int
    saved_at_seconds: float
    damage: list[str]
    manifest: Manifest | None = None
    state: dict[str, Any] = field(default_factory=dict)
    base: Base | None = None
    base_damage: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Of its name."""
        step = folder_step(self.folder)
        assert step is not None, "only folders of steps are looked at"
        return step

    @property
    def is_valid(self) -> bool:
        """Whether a run could begin with it, as far as it was looked at."""
        return not self.damage and not self.base_damage


def look_at(
    folder: Path, *watch: Watch, checksums: bool = False, bases: dict[Base, list[str]] | None = None
) -> Item:
    """A step's folder: whether its files are there and unchanged, those of tensors with `checksums` only.

    watch: is given each block that is read for a checksum.
    bases: what is wrong with those that were looked at; others are added, so that none is read twice.
    """
    size_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    manifest_path = folder / MANIFEST
    saved_at = (manifest_path if manifest_path.is_file() else folder).stat().st_mtime
    damage = list(find_damage(folder, *watch, checksums=checksums))
    try:
        manifest, state, base = read_manifest(folder), read_record(folder / STATE), base_of(folder)
    except CheckpointError as error:
        return Item(folder, size_bytes, saved_at, damage or [str(error)])
    known = {} if bases is None else bases
    if base is not None and base not in known:
        known[base] = _damage_of_base(base, *watch, checksums=checksums, bases=known)
    return Item(folder, size_bytes, saved_at, damage, manifest, state, base, known[base] if base else [])


def _damage_of_base(base: Base, *watch: Watch, checksums: bool, bases: dict[Base, list[str]]) -> list[str]:
    if problem := base.problem():
        return [f"the manifest of its base {base.folder} {problem}"]
    found = look_at(base.folder, *watch, checksums=checksums, bases=bases)
    return [f"its base {base.folder}: {line}" for line in found.damage] + found.base_damage


def require_item(path: Path) -> Item:
    """The newest checkpoint at `path` whose files are all there, in their sizes; else CheckpointError."""
    items = []
    for folder in require_folders(path):
        items.append(look_at(folder))
        if not items[-1].damage:
            return items[-1]
    raise CheckpointError(f"no valid checkpoint in {path}: {items[0].folder.name}: {items[0].damage[0]}")


def require_folders(path: Path) -> list[Path]:
    """The checkpoints at `path`, the newest first. CheckpointError if there is none."""
    folders = checkpoints_at(path)
    if not folders:
        raise no_checkpoint(path)
    return folders


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises CheckpointError when there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} cannot be read: it is not a JSON object")
    return record


def size_to_read(folders: Iterable[Path]) -> int:
    """Bytes that a check of all checksums reads, bases among them; 0 of what is too damaged to be read."""
    return sum(map(_size_of_files, {place for folder in folders for place in _with_bases(folder)}))


def _with_bases(folder: Path) -> Iterator[Path]:
    yield folder
    with suppress(CheckpointError):
        if base := base_of(folder):
            yield from _with_bases(base.folder)


def _size_of_files(folder: Path) -> int:
    with suppress(CheckpointError):
        return sum(entry.size_bytes for entry in read_manifest(folder).files.values())
    return 0


def unfinished(root: Path) -> list[Path]:
    """What saves and removals that were interrupted have left, or others do at the moment; never read."""
    return sorted(root.glob(f"step-*{ASIDE}"))
