"""The weights below an adapter: a checkpoint of adapters says which checkpoint they were trained on.

In its state.json, under "base": the step's folder, relative where both lie in one run's folder, so that a run
can be moved; and the sha256 of that folder's manifest, which has those of all its files.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.checkpoint.format import MANIFEST, STATE, CheckpointError
from megalite.checkpoint.tensor_file import hash_file

BASE = "base"  # in state.json


@dataclass(frozen=True)
class Base:
    """The checkpoint that stayed as it was while adapters were trained.

    Attributes:
        folder: of its step.
        fingerprint: the sha256 of its manifest.
    """

    folder: Path
    fingerprint: str

    @classmethod
    def of(cls, folder: Path) -> "Base":
        """A checkpoint as it is now."""
        return cls(Path(folder), hash_file(Path(folder) / MANIFEST))

    def record(self, run_folder: Path) -> dict[str, str]:
        """For the state.json of a checkpoint in `run_folder`/checkpoints/step-XXXXXXXX."""
        folder, run_folder = self.folder.resolve(), run_folder.resolve()
        if folder.is_relative_to(run_folder):
            folder = Path(os.path.relpath(folder, run_folder / "checkpoints" / "step"))
        return {"path": str(folder), "manifest_sha256": self.fingerprint}

    def check(self, checkpoint: Path) -> None:
        """Raise CheckpointError unless it is there, and is what the adapters of `checkpoint` were trained on.

        Its other files are not looked at: `find_checkpoint` does that.
        """
        problem = self.problem()
        if problem is not None:
            raise CheckpointError(
                f"{checkpoint} holds adapters of {self.folder}, whose manifest had sha256 {self.fingerprint} "
                f"and {problem}: put that checkpoint back, or start another run with output_dir=..."
            )

    def problem(self) -> str | None:
        """What its manifest is or has instead; None where it is the one that the adapters were trained on."""
        there = (self.folder / MANIFEST).is_file()
        found = hash_file(self.folder / MANIFEST) if there else None
        if found == self.fingerprint:
            return None
        return f"has sha256 {found}" if there else "is absent (sha256 none)"


def base_of(checkpoint: Path) -> Base | None:
    """What the adapters of a checkpoint were trained on; None for a checkpoint of whole weights.

    Raises CheckpointError when its state cannot be read.
    """
    path = Path(checkpoint) / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record = state.get(BASE)
        return record and Base((path.parent.resolve() / record["path"]).resolve(), record["manifest_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
