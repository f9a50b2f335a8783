"""A checkpoint's folder comes to its name and loses it again, so that after each operation one is whole.

step-00000010.tmp         is being written
step-00000010             is whole
step-00000010.replaced    was whole until another one of the step took its name; counts while none has it
step-00000010.old.tmp     is being removed
"""

import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalite.checkpoint.format import REPLACED, CheckpointError, step_folder
from megalite.checkpoint.space import SHARED_REMEDY, require_space
from megalite.files import ASIDE, sync_folder


def aside_of_step(root: Path, step: int) -> Path:
    """Where a step's checkpoint is written."""
    folder = step_folder(root, step)
    return folder.with_name(folder.name + ASIDE)


@contextmanager
def nothing_left_on_error(aside: Path, leads: bool, what: str) -> Iterator[None]:
    """Where the block fails, what it wrote aside is removed by the rank that leads; `what` was not done."""
    try:
        yield
    except Exception as error:
        if leads:
            shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what}: {error}") from error


def create_aside(root: Path, aside: Path, size_bytes: int, remedy: str = SHARED_REMEDY) -> None:
    """A fresh folder to write so much into. What an interrupted save or removal left behind goes first."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"step-*{ASIDE}"):
        shutil.rmtree(stale, ignore_errors=True)
    for replaced in root.glob(f"step-*{REPLACED}"):
        _settle(replaced)
    require_space(root, size_bytes, remedy)
    aside.mkdir()


def _settle(replaced: Path) -> None:
    """End an exchange of checkpoints that was interrupted, on the side where it was."""
    folder = replaced.with_name(replaced.name.removesuffix(REPLACED))
    if not folder.exists():
        replaced.rename(folder)
        sync_folder(folder.parent)
    else:
        remove([replaced])


def publish(aside: Path, folder: Path) -> None:
    """Give what was written its name; one that has the name stays whole, and is found, until then."""
    sync_folder(aside)
    replaced = folder.with_name(folder.name + REPLACED)
    is_replacing = folder.exists()
    if is_replacing:
        folder.rename(replaced)
    aside.rename(folder)
    sync_folder(folder.parent)
    if is_replacing:
        remove([replaced])


def remove(folders: Iterable[Path]) -> None:
    """Remove checkpoints; one that cannot be is warned of, and costs nothing else.

    A name goes before its files: half removed, it must not look damaged.
    """
    for folder in folders:
        try:
            buried = folder.rename(folder.with_name(f"{folder.name}.old{ASIDE}"))
            sync_folder(folder.parent)  # or a power cut may bring the name back, without all of its files
            shutil.rmtree(buried)
        except OSError as error:
            warnings.warn(f"the old checkpoint {folder.name} was not removed: {error}", stacklevel=2)
