"""Files that all nodes are to see: the run's folder, and what the run reads."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.space import require_space
from megalite.config.run import RunConfig
from megalite.data.blend import parse_blend
from megalite.data.indexed_dataset import IndexedDataset
from megalite.error import told_to_users
from megalite.exit_status import STORAGE
from megalite.model.flops import num_parameters
from megalite.model.table import model_table
from megalite.optimizer.recipe import state_bytes
from megalite.optimizer.recipes import build_recipe
from megalite.preflight.fault import Fault
from megalite.training.output import make_folder

MASTER_BYTES = 4  # of a weight in a checkpoint, fp32


class Token:
    """A file in the run's folder that rank 0 leaves there, and all ranks read back."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path, self.text = folder / f".preflight-{text[:8]}", text

    @classmethod
    def leave(cls, output_dir: str) -> "Token":
        """Write a new one; OutputError where the folder cannot be written."""
        token = cls(make_folder(output_dir), secrets.token_hex(16))
        token.path.write_text(token.text)
        return token

    def problem(self, seconds: float) -> str | None:
        """Why it is not seen here in that time, or nothing can be written beside it; None if all is well."""
        deadline, found = time.monotonic() + seconds, None
        while found is None:
            try:
                found = self.path.read_text()
            except OSError as error:
                if time.monotonic() > deadline:
                    return f"what rank 0 wrote there is not seen ({error.strerror}): is it shared?"
                time.sleep(0.1)
        if found != self.text:
            return "what rank 0 wrote there has other content"
        try:
            make_folder(str(self.path.parent))
        except ValueError as error:
            return str(error)
        return None


def unreadable(run: RunConfig) -> dict[str, str]:
    """What the run is to read and cannot be read here: name -> why."""
    lists = [items for items in (run.data.train, run.data.validation) if items]
    names = [name for items in lists for name in parse_blend(items)[0]]
    look = IndexedDataset if run.task == "pretrain" else _look_for
    looks: list[tuple[str, Callable[[str], object]]] = [(name, look) for name in names]
    if run.checkpoint.start_from:
        looks.append((run.checkpoint.start_from, _look_for))
    found = {name: _reason(look, name) for name, look in looks}
    return {name: reason for name, reason in found.items() if reason}


def _look_for(name: str) -> None:
    if ":" not in name:  # hf:NAME is looked for when the run starts
        Path(name).stat()


def _reason(look: Callable[[str], object], name: str) -> str | None:
    try:
        look(name)
    except Exception as error:
        if told_to_users(error) is None:
            raise
        return told_to_users(error)
    return None


def checkpoint_bytes(run: RunConfig) -> int:
    """Of one checkpoint: fp32 weights and the optimizer's state. Of adapters it is not known on paper: 0."""
    if run.lora.rank:
        return 0
    shapes = {row.name: row.shape for row in model_table(run.model)}
    return MASTER_BYTES * num_parameters(run.model) + state_bytes(build_recipe(run.optimizer), shapes)


def lack_of_space(run: RunConfig) -> list[Fault]:
    """A fault where the run's folder has no room for a checkpoint."""
    try:
        require_space(Path(run.output_dir), checkpoint_bytes(run))
    except CheckpointError as error:
        return [Fault(STORAGE, str(error))]
    return []
