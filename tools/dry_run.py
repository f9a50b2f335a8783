"""Walk one step of a job of thousands of ranks in this process: does it end, and what does it take?

    python tools/dry_run.py --deepspeed_config configs/deepspeed/llama3_70b.json \\
           --config configs/runs/llama3_70b.yaml --ranks 4096

The real model, schedule and groups are walked on tensors without numbers. Every send must meet its receive
and every collective all its members, in order; what does not is named with its ranks and place in the step.
Told are the memory of each stage and the bytes on each link. docs/dry_run.md says what is walked, what not.
"""

import argparse
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalite.error import UserError, run_command
from megalite.exit_status import FINISHED
from megalite.inspection.table import aligned, as_json, bytes_in_words
from megalite.training.command import Parser, resolve
from megalite.training.environment import choose_cpu_accelerator

if TYPE_CHECKING:
    from megalite.dryrun.links import Traffic
    from megalite.dryrun.verdict import Verdict

FAULTY = 1  # exit status of a job that would not come to its end


def parser() -> argparse.ArgumentParser:
    """The launchers' configuration, and of how many ranks and nodes the job is."""
    command = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = command.add_argument
    add("--deepspeed_config", required=True, metavar="JSON", help="DeepSpeed configuration")
    add("--config", nargs="?", metavar="YAML", help="the run (default: a small one)")
    add("--ranks", required=True, type=int, metavar="N", help="of the job, one GPU each")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="ranks of a node (default: %(default)s)")
    add("--task", choices=("pretrain", "finetune"), default="pretrain", help="default: %(default)s")
    add("--json", action="store_true", help="what was found as JSON")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the run")
    return command


def main(argv: list[str] | None = None) -> int:
    """Walk; 0 where the step comes to its end, 1 where it does not, 2 after a mistake."""
    return run_command(lambda: _run(parser().parse_intermixed_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    ranks, gpus_per_node = arguments.ranks, arguments.gpus_per_node
    for name, number in (("--ranks", ranks), ("--gpus-per-node", gpus_per_node)):
        if number < 1:
            raise UserError(f"{name} is {number}: give at least 1")
    run, deepspeed = resolve(arguments, ranks, arguments.task)
    choose_cpu_accelerator()
    from megalite.dryrun.verdict import dry_run

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    verdict = dry_run(run, deepspeed, ranks, gpus_per_node, tell)
    if arguments.json:
        print(as_json(facts(verdict, gpus_per_node)))
    else:
        print("\n".join(page(verdict)))
    for fault in verdict.faults:
        tell(f"fault: {fault}")
    return FAULTY if verdict.faults else FINISHED


def facts(verdict: "Verdict", gpus_per_node: int) -> dict[str, Any]:
    """What was found, as plain values; sizes in bytes, of a step."""
    return {
        "ranks": verdict.roster.world_size,
        "gpus_per_node": gpus_per_node,
        "faults": verdict.faults,
        "entries": verdict.num_entries,
        "stages": [
            {
                "pp_rank": pp_rank,
                "layers": [[layers.start, layers.stop] for layers in walk.layers],
                "entries": len(walk.log),
                "weights_bytes": walk.weight_bytes,
                "passes_peak_bytes": walk.peak_bytes,
                "passes_peak_at": walk.peak_place,
                "state_bytes": walk.state_bytes,
                "total_bytes": walk.total_bytes,
            }
            for pp_rank, walk in enumerate(verdict.walks)
        ],
        "links": {
            name: {
                "ranks_of_group": traffic.num_members,
                "entries_of_rank": traffic.num_entries,
                "in_node_bytes_of_rank": largest(traffic.in_node_bytes),
                "between_nodes_bytes_of_rank": largest(traffic.between_nodes_bytes),
                "in_node_bytes": sum(traffic.in_node_bytes.values()),
                "between_nodes_bytes": sum(traffic.between_nodes_bytes.values()),
            }
            for name, traffic in verdict.traffic.items()
        },
        "seconds": verdict.seconds,
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def page(verdict: "Verdict") -> Iterator[str]:
    """What was found, for people."""
    ranks, entries = verdict.roster.world_size, verdict.num_entries
    if verdict.walks:
        yield "memory of a rank, by its place in the pipeline"
        yield from aligned([*_memory_rows(verdict)], "llrrrrl")
        yield ""
        yield "what a rank says in a step: the most of any, and of all together"
        yield from aligned([*_link_rows(verdict.traffic)], "lrrrrrr")
        yield ""
    if verdict.faults:
        yield f"{ranks:,} ranks: the step does not come to its end, faults: {len(verdict.faults)}"
    else:
        met = "every send met its receive, every collective its members"
        yield f"{ranks:,} ranks, {entries:,} entries: {met}"


def _memory_rows(verdict: "Verdict") -> Iterator[list[str]]:
    yield ["place", "layers", "weights", "passes", "state", "in all", "most in the passes at"]
    for pp_rank, walk in enumerate(verdict.walks):
        layers = ", ".join(f"{held.start} to {held.stop - 1}" for held in walk.layers)
        state = sum(walk.state_bytes.values())
        sizes = walk.weight_bytes, walk.peak_bytes - walk.weight_bytes, state, walk.total_bytes
        yield [str(pp_rank), layers, *map(bytes_in_words, sizes), walk.peak_place]


def _link_rows(traffic: "dict[str, Traffic]") -> Iterator[list[str]]:
    yield ["group", "ranks", "entries", "in node", "between nodes", "all in node", "all between nodes"]
    for name, over in traffic.items():
        near, far = over.in_node_bytes, over.between_nodes_bytes
        sizes = largest(near), largest(far), sum(near.values()), sum(far.values())
        yield [name, f"{over.num_members:,}", f"{over.num_entries:,}", *map(bytes_in_words, sizes)]


def largest(by_rank: dict[int, int]) -> int:
    """Of all ranks', 0 where there is none."""
    return max(by_rank.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
