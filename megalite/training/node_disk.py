"""The folder of a run on each node's own disk (checkpoint.local_dir)."""

import shutil
import uuid
from pathlib import Path
from tempfile import TemporaryFile

from megalite.checkpoint.agreement import on_all_ranks
from megalite.checkpoint.local import NodeDisk
from megalite.config.run import RunConfig
from megalite.files import write_text
from megalite.training.output import OutputError
from megalite.training.world import gather, on_rank_0

RUN_ID = "local_id"  # in RUN_DIR/checkpoints: names the run's folders on the nodes


def open_disk(run: RunConfig, rank: int, node: str) -> NodeDisk | None:
    """This rank's, made if need be; None without checkpoint.local_dir. Collective.

    node: that this rank runs on. A run that begins anew, or whose folder was removed, gets a folder that has
    no checkpoints, whatever another run of its name has left.

    Raises CheckpointError on all ranks where a node's folder cannot be written, and names the rank.
    """
    if run.checkpoint.local_dir is None:
        return None
    root = Path(run.output_dir) / "checkpoints"
    before, run_id = on_rank_0(rank, lambda: _run_id(root, run.checkpoint.resume))
    local_dir = Path(run.checkpoint.local_dir)
    disk = NodeDisk(local_dir / run_id / node, tuple(gather(node)), rank)
    on_all_ranks(gather, lambda: _make_folder(disk.root))
    if disk.leads and before not in (run_id, None):
        shutil.rmtree(local_dir / before / node, ignore_errors=True)
    return disk


def _run_id(root: Path, resumes: bool) -> tuple[str | None, str]:
    """What it was before, and what it is now."""
    file = root / RUN_ID
    before = file.read_text(encoding="utf-8").strip() if file.exists() else None
    if before and resumes:
        return before, before
    root.mkdir(parents=True, exist_ok=True)
    run_id = f"{root.resolve().parent.name}-{uuid.uuid4().hex[:8]}"
    write_text(file, run_id + "\n")
    return before, run_id


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return
    except OSError as error:
        reason = f"checkpoint.local_dir: {folder} cannot be written: {error.strerror}"
        raise OutputError(f"{reason}: choose a folder that every node has, or null") from None
