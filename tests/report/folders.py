"""Folders as runs write them, small, and without training."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megalite.config.load import dump_run, load_run
from megalite.evaluation.record import Evaluation, Measurement
from tests.checkpoint.worlds import save_world

HOSTILE = "<script>alert(1)</script>&\"'"
DEEPSPEED = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
}
PIPELINE = [
    "parallel.pp_size=2",
    "parallel.tp_size=2",
    "schedule.num_steps=9",
    "optimizer.learning_rate=0.125",
]
DATA = {
    "train": [{"prefix": HOSTILE, "weight": None, "bin_bytes": 4321, "ids_sha256": "ab" * 32, "epochs": [1]}]
}
MEMORY = {
    "ranks": [
        {
            "rank": rank,
            "planned_bytes": {"weights": 1_000_000, "moments": 2_000_000, "activations": 500_000 - rank},
            "state_bytes": {"weights": 1_000_000, "moments": 2_100_000},
            "at_start_bytes": 9_000_000,
            "peak_bytes": 4_000_000 + rank,
        }
        for rank in range(10)
    ]
}


def metric(step: int, **further: Any) -> dict[str, Any]:
    """A row of metrics.jsonl; no two of its numbers are the same."""
    row = {
        "step": step,
        "loss": 6.0 / step + 0.1234567,
        "grad_norm": 2.0 / step,
        "learning_rate": 1e-3 / step,
    }
    row |= {"consumed_samples": 16 * step, "consumed_tokens": 2048 * step, "step_seconds": 0.5 + step / 100}
    return row | {"tokens_per_second": 4096.0 + 100 * step, "mfu": 0.25 + step / 1000, **further}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_bare_run(folder: Path, num_steps: int) -> list[dict[str, Any]]:
    """A folder with metrics and nothing else; its rows."""
    rows = [metric(step) for step in range(1, num_steps + 1)]
    write_rows(folder, rows)
    return rows


def write_full_run(folder: Path) -> list[dict[str, Any]]:
    """A pipeline of 4 ranks that has met everything that a page tells of; its rows."""
    tokens = {"0": [10, 20, 30, 40], "2": [25, 25, 25, 25]}
    rows = [metric(step, expert_largest_violation=0.6 / step, expert_tokens=tokens) for step in range(1, 8)]
    for step in (2, 4, 6):
        rows[step - 1] |= {"validation_loss": 5.0 / step, "evaluation/arc_easy/acc": 0.25 + step / 100}
    rows[2] |= {"skipped_steps": 1, "grad_norm": None}
    for row in rows[3:]:
        row |= {"skipped_steps": 1, "rollbacks": 1}
    rows[4] |= {"save_stall_seconds": 0.75}
    write_rows(folder, rows)
    run = load_run(None, PIPELINE)
    files = {"config.yaml": dump_run(run), "deepspeed.json": json.dumps(DEEPSPEED)}
    for name, text in files.items():
        (folder / name).write_text(text)
    state = {"step": 6, "consumed_samples": 96, "versions": {"torch": "9.8.7"}, "data": DATA}
    save_world(folder / "checkpoints", 6, [[], [], [], []], state, files)
    for last_step in (0, 4):
        SummaryWriter(
            str(folder / "tensorboard"), purge_step=last_step + 1, filename_suffix=f".{last_step}"
        ).close()
    rows_of_tasks = [Measurement("hellaswag", "acc_norm", 0.4567, 0.01, 5, 200)]
    Evaluation({"path": "x", "step": 6}, {}, {}, rows_of_tasks).save(folder / "evaluation.json")
    (folder / "memory.json").write_text(json.dumps(MEMORY))
    write_timelines(folder)
    return rows


def write_timelines(folder: Path) -> None:
    """Of 2 ranks of a pipeline, which compute 0.3 and 0.2 seconds of the 0.4 from the first to the last."""
    facts = {
        "pipeline_schedule": "zb-h1",
        "pp_size": 2,
        "num_micro_batches": 1,
        "num_chunks": None,
        "step": 5,
    }
    kinds = ("Forward", "BackwardInput", "BackwardWeight")
    times = {0: [(0.0, 0.1), (0.2, 0.3), (0.3, 0.4)], 1: [(0.1, 0.15), (0.15, 0.25), (0.25, 0.3)]}
    for rank, spans in times.items():
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": "rank"}}
        ]
        for action, (begin, end) in zip(kinds, spans, strict=True):
            name = f"{action.lower()} 0"
            args = {"action": action, "micro_batch": 0, "chunk": 0}
            event = {"ph": "X", "pid": rank, "tid": 0, "cat": "compute", "name": name, "args": args}
            events.append(event | {"ts": begin * 1e6, "dur": (end - begin) * 1e6})
        transfer = {"pid": rank, "tid": 1, "cat": "transfer", "name": "activation 0", "id": f"{rank}.0"}
        events += [transfer | {"ph": "b", "ts": 1e5, "args": {}}, transfer | {"ph": "e", "ts": 1.1e5}]
        content = {
            "traceEvents": events,
            "otherData": facts | {"pp_rank": rank, "pipeline": 0, "world_size": 4},
        }
        (folder / f"timeline-rank{rank}.json").write_text(json.dumps(content))
