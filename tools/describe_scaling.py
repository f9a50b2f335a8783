"""Write the tables of docs/scaling.md anew: the shipped runs on clusters, as tools/plan_run.py plans them."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.device import load_device
from megalite.config.load import load_run
from megalite.error import UserError, run_command
from megalite.files import write_text
from megalite.plan.job import Job
from megalite.plan.page import bytes_in_words, page_of, seconds_in_words
from megalite.plan.plan import Plan, make_plan

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Row:
    """A run on a cluster; the rest is in its YAML and JSON.

    Attributes:
        name: of configs/runs and configs/deepspeed.
        overrides: of the run.
        micro_batch, zero, batch: in place of those of the JSON.
    """

    title: str
    name: str
    nodes: int
    device: str = "a100-80"
    overrides: tuple[str, ...] = ()
    micro_batch: int | None = None
    zero: int | None = None
    batch: int | None = None


LLAMA_405B = (
    "model.hidden_size=16384",
    "model.intermediate_size=53248",
    "model.num_hidden_layers=126",
    "model.num_attention_heads=128",
    "parallel.tp_size=8",
    "parallel.pp_size=16",
    "parallel.cp_size=2",
    "parallel.pipeline_schedule=interleaved",
    "parallel.num_chunks=7",
    "schedule.num_steps=929688",  # 15.6 trillion tokens
)
LARGEST = Row("405B", "llama3_70b", 2048, "h100", LLAMA_405B, 1, 1, 2048)
ROWS = [
    Row("460M", "pretrain_460m", 1),
    Row("460M", "pretrain_460m", 2),
    Row("460M", "pretrain_460m", 8, micro_batch=3),
    Row("7B", "llama2_7b", 4),
    Row("7B", "llama2_7b", 16),
    Row("MoE 16B", "moe_16b", 8),
    Row("70B", "llama3_70b", 64),
    Row("70B", "llama3_70b", 128),
]
FULL = ROWS[6]

HEADS = (
    "run",
    "GPUs",
    "tensor x context x pipeline x data",
    "ZeRO",
    "micro batches",
    "step",
    "tokens/s per GPU",
    "MFU",
    "waits",
    "fullest",
    "days",
    "save every",
)


@cache
def plan_of(row: Row) -> Plan:
    """The plan of a row."""
    run = load_run(str(ROOT / f"configs/runs/{row.name}.yaml"), list(row.overrides))
    where = ROOT / f"configs/deepspeed/{row.name}.json"
    raw = json.loads(where.read_text(encoding="utf-8"))
    changes = {"train_micro_batch_size_per_gpu": row.micro_batch, "train_batch_size": row.batch}
    raw |= {key: value for key, value in changes.items() if value is not None}
    if row.zero is not None:
        raw["zero_optimization"] |= {"stage": row.zero}
    dp_size = run.dp_size_of(row.nodes * GPUS_PER_NODE)
    deepspeed = deepspeed_config_from(raw, where.name, dp_size=dp_size, hidden_size=run.model.hidden_size)
    device = load_device(ROOT / f"configs/devices/{row.device}.yaml")
    return make_plan(Job(run, deepspeed, device, row.nodes, GPUS_PER_NODE))


BLOCK = re.compile(r"(<!-- planned: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def described(page: str) -> str:
    """A page with its planned blocks as the code has them today.

    Raises UserError for a block that is none of ours.
    """

    def filled(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in BLOCKS:
            raise UserError(f"the page has a block planned: {name}, known are {', '.join(BLOCKS)}: rename it")
        return f"{begin}{BLOCKS[name]()}{end}"

    return BLOCK.sub(filled, page)


def _table(rows: Sequence[Row]) -> str:
    return "".join([_line(HEADS), _line(["---"] * len(HEADS)), *map(_row, rows)])


def _full() -> str:
    return f"```text\n{page_of(plan_of(FULL))}\n```\n"


def _largest() -> str:
    """Figures of the largest plan, one a row."""
    plan = plan_of(LARGEST)
    saved, job, world_size = plan.checkpoint, plan.job, plan.job.world_size
    groups = sum(world_size // job.topology[axis].size for axis in ("tp", "cp", "pp", "dp"))
    shares = (f"{name} {seconds / plan.step.total:.1%}" for name, seconds in plan.step.parts.items())
    facts = {
        "where a step goes": ", ".join(shares),
        "ranks that ZeRO partitions over (dp x cp)": f"{job.data_size}",
        "a failure every": seconds_in_words(saved.hours_between_failures * 3600),
        "a checkpoint": bytes_in_words(saved.size_bytes),
        "to write it": seconds_in_words(saved.write_seconds),
        "save every": f"{seconds_in_words(saved.interval_seconds)} "
        f"({round(saved.interval_seconds / plan.step.total):,} steps)",
        "lost to writing and to steps done again": f"{saved.lost_fraction:.1%}",
        "lost if a restart takes ten minutes, besides": f"{1 / 6 / saved.hours_between_failures:.1%}",
        "process groups along single axes": f"{groups:,}",
    }
    return "".join([_line(["", ""]), _line(["---"] * 2), *map(_line, facts.items())])


def _row(row: Row) -> str:
    plan = plan_of(row)
    job, topology = plan.job, plan.job.topology
    sizes = " x ".join(str(topology[axis].size) for axis in ("tp", "cp", "pp", "dp"))
    experts = f", experts over {topology['ep'].size}" if topology["ep"].size > 1 else ""
    micro = f"{job.num_micro_batches} x {job.deepspeed.train_micro_batch_size_per_gpu}"
    cells = [row.title, f"{job.world_size:,}", sizes + experts, f"{job.deepspeed.zero_stage}", micro]
    cells.append(seconds_in_words(plan.step.total))
    cells += [f"{plan.tokens_per_second / job.world_size:,.0f}", f"{plan.mfu:.1%}"]
    cells.append(f"{plan.step.bubble_fraction:.1%}")
    cells.append(bytes_in_words(max(sum(of_rank.values()) for of_rank in plan.memory)))
    return _line([*cells, f"{plan.days:,.1f}", seconds_in_words(plan.checkpoint.interval_seconds)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "clusters": partial(_table, ROWS),
    "full": _full,
    "largest": partial(_table, [LARGEST]),
    "figures": _largest,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    page = "page whose planned blocks are written anew (default: %(default)s)"
    parser.add_argument("--page", type=Path, default=PAGE, help=page)
    arguments = parser.parse_args(argv)
    return run_command(lambda: rewrite(arguments.page))


def rewrite(page: Path) -> None:
    """Write the blocks of a page anew, and say so."""
    write_text(page, described(page.read_text(encoding="utf-8")))
    print(f"wrote {page}")


if __name__ == "__main__":
    sys.exit(main())
