"""memory.json of a run's folder: the bytes of each rank, by what they are for."""

import json
from pathlib import Path
from typing import Any

from megalite.measure.memory_table import MEMORY_FILE, RankMemory
from megalite.report.content import ReportError


def read_memory(run_dir: Path) -> list[RankMemory]:
    """Of all ranks; empty where the run has no such file, ReportError in one line where it is another."""
    path = run_dir / MEMORY_FILE
    if not path.is_file():
        return []
    try:
        ranks = json.loads(path.read_text(encoding="utf-8"))["ranks"]
        return [_of_rank(one) for one in ranks]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path.name} is not a run's record of memory ({error!r})") from None


def _of_rank(found: Any) -> RankMemory:
    planned, state = (
        {name: int(size) for name, size in found[sizes].items()} for sizes in ("planned_bytes", "state_bytes")
    )
    numbers = (int(found[name]) for name in ("at_start_bytes", "peak_bytes"))
    return RankMemory(int(found["rank"]), planned, state, *numbers)
