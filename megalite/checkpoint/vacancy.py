"""Where an export may go."""

from pathlib import Path

from megalite.checkpoint.format import CheckpointError


def require_vacant(output: Path) -> None:
    """Raise CheckpointError when there is something at `output`, but for an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder: remove it or name another")
