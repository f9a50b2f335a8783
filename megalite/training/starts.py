"""Starts of a run from one step are counted: one that dies the same way each time is not tried for ever."""

import json
from pathlib import Path

from megalite.files import write_text

STARTS_FILE = "starts.json"


def note_start(run_dir: Path, step: int, most: int) -> str | None:
    """Count a start from a step; why it is one too many, where `most` (0: any number) came to nothing new."""
    file = run_dir / STARTS_FILE
    before = _read(file)
    starts = before["starts"] if before.get("step") == step else 0
    if most and starts >= most:
        return (
            f"{starts} starts from step {step} have come to no newer checkpoint (stop.after_starts {most}): "
            f"see what ended them, then remove {file} to try again"
        )
    write_text(file, json.dumps({"step": step, "starts": starts + 1}) + "\n")
    return None


def _read(file: Path) -> dict[str, int]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there, or spoilt by hand: it counts from here
        return {}
