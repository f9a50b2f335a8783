"""What a search found, for people, and as configs that are ready to run (no torch)."""

import json
from pathlib import Path
from typing import Any

from megalite.config.load import dump_run
from megalite.files import write_text
from megalite.plan.page import bytes_in_words, seconds_in_words, table
from megalite.plan.plan import Plan
from megalite.plan.search import Search, name_of


def page_of_search(search: Search) -> str:
    """The best layouts in a table, and why the others are out."""
    rows = [["layout", "step", "MFU", "tokens/s", "fullest rank", "waits", "days"]]
    for number, plan in enumerate(search.plans, 1):
        fullest = max(sum(of_rank.values()) for of_rank in plan.memory)
        row = [f"{number}. {name_of(plan.job)}", seconds_in_words(plan.step.total), f"{plan.mfu:.1%}"]
        row += [f"{plan.tokens_per_second:,.0f}", bytes_in_words(fullest)]
        rows.append([*row, f"{plan.step.bubble_fraction:.1%}", f"{plan.days:,.1f}"])
    out = [["ruled out", "layouts"]]
    for reason, number in search.ruled_out.most_common():
        out.append([reason, f"{number:,}"])
    examples = [f"  {reason}: {example}" for reason, example in search.examples.items()]
    told = "\n".join(["  for example", *examples]) if examples else ""
    counted = f"{search.num_layouts:,} layouts looked at, the best {len(search.plans)}:"
    return "\n\n".join(part for part in (counted, table(rows), table(out), told) if part)


def search_as_json(search: Search) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "num_layouts": search.num_layouts,
        "best": [{"name": name_of(plan.job), **plan.to_json()} for plan in search.plans],
        "ruled_out": dict(search.ruled_out),
        "examples": search.examples,
    }


def write_configs(search: Search, folder: Path) -> list[str]:
    """A YAML and a DeepSpeed JSON of each of the best layouts; returns the commands that start them."""
    return [_write_pair(plan, folder, number) for number, plan in enumerate(search.plans, 1)]


def _write_pair(plan: Plan, folder: Path, number: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{number}_{name_of(plan.job)}"
    run, deepspeed = folder / f"{name}.yaml", folder / f"{name}.json"
    write_text(run, dump_run(plan.job.run))
    write_text(deepspeed, json.dumps(plan.job.deepspeed.raw, indent=2) + "\n")
    return f"deepspeed launchers/pretrain.py --deepspeed_config {deepspeed} --config {run}"
