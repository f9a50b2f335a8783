"""Runs that many things happen to, by the hundred: python -m tests.chaos.run --faults 300

Each scenario is drawn from a seed, and begins a run of eight steps on one to four ranks that is killed,
stopped, cut from power, damaged, or meets a full disk, several times, and goes on each time. It prints a line
per fault and appends it to a table; a later call goes on with the seed after the last one there.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.chaos.scenario import MOST_FAULTS, Play, Undisturbed, play

TABLE = Path("build/chaos.jsonl")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(1)  # ranks are forked: a thread pool in the parent would not survive it
    gc.freeze()  # nor are they to look through what they have in common
    table = Path(options.table)
    table.parent.mkdir(parents=True, exist_ok=True)
    seed = (
        options.seed if options.seed is not None else 1 + max((row["seed"] for row in read(table)), default=0)
    )
    give_up_at = time.monotonic() + 3600 * options.hours
    num_faults = num_wrong = 0
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    undisturbed = Undisturbed(folder)
    while num_faults < options.faults and time.monotonic() < give_up_at:
        most_faults = min(MOST_FAULTS, options.faults - num_faults)
        played, wrong = play(seed, undisturbed, folder / f"seed-{seed}", most_faults)
        with table.open("a", encoding="utf-8") as file:
            for row in rows_of(played, wrong):
                print(in_words(row), flush=True)
                file.write(json.dumps(row) + "\n")
        num_faults, num_wrong, seed = num_faults + len(played.rows), num_wrong + (wrong is not None), seed + 1
        if wrong is not None:
            print(f"seed {played.scenario.seed}: {wrong}\nits run is left in {folder}", file=sys.stderr)
    if not num_wrong:
        folder.rmdir()
    print(summary(read(table)))
    return 1 if num_wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.chaos.run", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the first run; default: the one after the table's last")
    parser.add_argument("--faults", type=int, default=300, help="how many are to come (default 300)")
    parser.add_argument("--hours", type=float, default=1.0, help="after which no scenario begins (default 1)")
    parser.add_argument("--table", default=str(TABLE), help=f"JSON lines to append to (default {TABLE})")
    return parser.parse_args(argv)


def rows_of(played: Play, wrong: str | None) -> Iterator[dict[str, Any]]:
    """A row per fault; what was wrong stands in the last one, and makes one where there was no fault."""
    scenario = {"seed": played.scenario.seed, "run": played.scenario.in_words()}
    rows = played.rows or ([{"kind": "none", "fault": "", "what": ""}] if wrong else [])
    for number, row in enumerate(rows):
        is_last = number == len(rows) - 1
        yield scenario | row | {"result": wrong.splitlines()[0] if wrong and is_last else "equal"}


def read(table: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []


def in_words(row: dict[str, Any]) -> str:
    return f"seed {row['seed']} ({row['run']}): {row['kind']}, {row['fault']}; {row['what']}: {row['result']}"


def summary(rows: list[dict[str, Any]]) -> str:
    """A table of the faults by kind, as docs/reliability.md has it."""
    counts = Counter(row["kind"] for row in rows)
    wrong = Counter(row["kind"] for row in rows if row["result"] != "equal")
    lines = ["| fault | times | run not equal to the undisturbed one |", "|---|---|---|"]
    lines += [f"| {kind} | {count} | {wrong[kind]} |" for kind, count in sorted(counts.items())]
    seeds = {row["seed"] for row in rows}
    lines.append(f"| all, {len(seeds)} runs | {len(rows)} | {wrong.total()} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
