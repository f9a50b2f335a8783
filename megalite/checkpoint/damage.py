"""Whether the files of a checkpoint are those that were written."""

from collections.abc import Callable, Iterator
from pathlib import Path

from megalite.checkpoint.format import CheckpointError, FileEntry, folder_step, read_manifest
from megalite.checkpoint.stream import Block
from megalite.checkpoint.tensor_file import hash_file

TENSORS = ".safetensors"  # suffix of the large files

Watch = Callable[[Block], object]


def find_damage(
    folder: Path, *watch: Watch, checksums: bool = True, rank: int = 0, world_size: int = 1
) -> Iterator[str]:
    """What is wrong with a rank's share of the files, a line for each; nothing when nothing is.

    It is looked for as the lines are taken: the first costs no more than the files before it.

    watch: is given each block that is read.
    checksums: whether the files of tensors are read too; else their sizes are looked at alone.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        yield str(error)
        return
    if manifest.step != folder_step(folder):
        yield f"its manifest is of step {manifest.step}"
        return
    for name, entry in list(manifest.files.items())[rank::world_size]:
        is_read = checksums or not name.endswith(TENSORS)
        yield from damage_of(folder / name, entry, watch if is_read else None)


def damage_of(path: Path, entry: FileEntry, watch: tuple[Watch, ...] | None = ()) -> Iterator[str]:
    """What is wrong with one file. watch: as of `find_damage`; None where its size is enough."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            yield f"{path.name} has {size_bytes} bytes, {entry.size_bytes} were written"
        elif watch is not None and hash_file(path, *watch) != entry.sha256:
            yield f"{path.name} does not match its sha256"
    except FileNotFoundError:
        yield f"{path.name} is missing"
    except OSError as error:
        yield str(error)
