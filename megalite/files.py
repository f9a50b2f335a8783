"""Files and folders that are complete or absent, also after a crash: written aside, synced, renamed."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ASIDE = ".tmp"  # suffix of what is being written


@contextmanager
def written_aside(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write, which takes the place of `path` when the block ends, and vanishes if it fails.

    mode: "w" for UTF-8 text, "wb" for bytes. The folder of `path` must exist; an OSError names `path` itself.
    """
    path = Path(path)
    aside = aside_of(path)
    try:
        with aside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            sync(file)
        aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename == str(aside):
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Put `text` at `path`; what stood there before is replaced at once."""
    with written_aside(path) as file:
        file.write(text)


@contextmanager
def folder_aside(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which gets the name `path` when the block ends, and vanishes if it fails.

    The files in it are the block's to sync. `path` may be an empty folder, or not exist.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    aside.mkdir()
    try:
        yield aside
        sync_folder(aside)
        aside.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """A hidden name beside `path` that no other writer has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{ASIDE}")


def left_aside(path: Path) -> list[Path]:
    """What writers of `path` that were killed have left, or others write at the moment."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*{ASIDE}"))


def sync(file: IO[Any]) -> None:
    """See that what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """See that a folder's names, as they are now, are on the disk: a rename may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
