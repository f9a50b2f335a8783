"""What is known of a run's checkpoints, and of one of them, as facts for people and machines."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megalite.checkpoint.format import CONFIG, CheckpointError
from megalite.checkpoint.load import TensorReader, read_config
from megalite.config.deepspeed import load_deepspeed
from megalite.inspection.blocks import BlockReader, model_first
from megalite.inspection.inventory import Item, unfinished
from megalite.inspection.statistics import statistics_of
from megalite.inspection.table import Facts
from megalite.measure.metrics import METRICS_FILE
from megalite.model.flops import num_active_parameters, num_parameters

DEEPSPEED = "deepspeed.json"


def facts_of_run(path: Path, items: Sequence[Item], *, verified: bool) -> Facts:
    """A list of its checkpoints, in the order that is given, the newest last."""
    rows = read_rows(run_of(items[0]))
    valid = [item for item in items if item.is_valid]
    return {
        "path": str(path),
        "verified": verified,
        "checkpoints": [_facts_of_item(item, rows) for item in items],
        "newest_valid": str(valid[-1].folder) if valid else None,
        "unfinished": [str(folder) for folder in unfinished(items[0].folder.parent)],
    }


def run_of(item: Item) -> Path:
    """The folder of the run that has a checkpoint."""
    return item.folder.resolve().parent.parent


def read_rows(run_dir: Path) -> dict[int, Facts]:
    """step -> its row of metrics.jsonl; none where there is no such file. The last line may be in the making.

    Raises CheckpointError for another line that is no row.
    """
    path = run_dir / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return dict(_step_and_row(path, n, line) for n, line in enumerate(lines, 1) if line.endswith("\n"))


def _step_and_row(path: Path, number: int, line: str) -> tuple[int, Facts]:
    try:
        row = json.loads(line)
        return row["step"], row
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}, line {number}: not a row of metrics: remove the line") from None


def _facts_of_item(item: Item, rows: dict[int, Facts]) -> Facts:
    """What both the list and the page of one checkpoint say."""
    row = rows.get(item.step, {})
    return {
        "folder": str(item.folder),
        "step": item.step,
        "size_bytes": item.size_bytes,
        "saved_at_seconds": item.saved_at_seconds,
        "valid": item.is_valid,
        "damage": item.damage,
        "base_damage": item.base_damage,
        "consumed_tokens": item.state.get("consumed_tokens"),
        "loss": row.get("loss"),
        "validation_loss": row.get("validation_loss"),
    }


def facts_of_checkpoint(item: Item, tensors: Iterable[Facts], *, verified: bool) -> Facts:
    """All that is known of one; less where it is damaged."""
    facts = {"verified": verified, **_facts_of_item(item, read_rows(run_of(item)))}
    if item.manifest is None:
        return facts
    facts |= {"num_ranks": item.manifest.world_size, "files": list(item.manifest.files), "state": item.state}
    if item.base is not None:
        facts["base"] = {"folder": str(item.base.folder), "manifest_sha256": item.base.fingerprint}
    if not item.damage and CONFIG in item.manifest.files:
        facts |= _facts_of_configs(item, item.manifest.world_size)
    return facts | {"tensors": list(tensors)}


def _facts_of_configs(item: Item, num_ranks: int) -> Facts:
    """The model, and the layout that wrote the checkpoint."""
    run = read_config(item.folder)
    parallel = run.parallel
    layout: dict[str, Any] = {
        "tp_size": parallel.tp_size,
        "pp_size": parallel.pp_size,
        "cp_size": parallel.cp_size,
        "dp_size": num_ranks // (parallel.tp_size * parallel.pp_size * parallel.cp_size),
        "ep_size": parallel.ep_size,
        "sequence_parallel": parallel.sequence_parallel and parallel.tp_size > 1,
    }
    if (item.folder / DEEPSPEED).exists():
        deepspeed = load_deepspeed(str(item.folder / DEEPSPEED))
        layout |= {"zero_stage": deepspeed.zero_stage, "precision": deepspeed.precision}
    parameters = {"total": num_parameters(run.model), "active": num_active_parameters(run.model)}
    return {"layout": layout, "parameters": parameters, "config": run.model_dump()}


def facts_of_tensors(item: Item, *, statistics: bool) -> Iterator[Facts]:
    """Of each tensor, the model's first; where files are damaged, what the manifest says alone.

    statistics: whether the numbers are read as well, a few blocks at a time.
    """
    if item.manifest is None:
        return
    reader = None if item.damage else TensorReader(item.folder)
    stored = reader.stored_bytes() if reader else {}
    blocks = BlockReader(reader) if reader and statistics else None
    entries = {(entry.kind, entry.name): entry for entry in item.manifest.tensors}
    for key in model_first(entries):
        entry, sizes = entries[key], stored.get(key, {})
        facts: Facts = {
            "kind": entry.kind,
            "name": entry.name,
            "shape": list(entry.full_shape),
            "num_elements": entry.num_elements,
            "num_bytes": sum(sizes.values()) if reader else None,
            "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in sizes),
        }
        if blocks:
            facts |= statistics_of(blocks, key)._asdict()
        yield facts
