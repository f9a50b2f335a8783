"""Room on the disk, looked at before it is needed."""

import shutil
from pathlib import Path

from megalite.checkpoint.format import CheckpointError

SPARE_BYTES = 1 << 20  # manifest, texts, and what the file system keeps of its own


SHARED_REMEDY = "free some, keep fewer checkpoints (checkpoint.keep_last), or use another output_dir"


def require_space(folder: Path, size_bytes: int, remedy: str = SHARED_REMEDY) -> None:
    """Raise CheckpointError where the file system of a folder has no room for so many bytes, and some spare.

    A quota, or another writer, may still end the room while it is used.
    """
    free_bytes, needed_bytes = shutil.disk_usage(folder).free, size_bytes + SPARE_BYTES
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{folder} has {_in_words(free_bytes)} free and a checkpoint needs {_in_words(needed_bytes)}: "
            f"{remedy}"
        )


def _in_words(size_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:,.1f} {unit}"
    return f"{size_bytes:,} bytes"
