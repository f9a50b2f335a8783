"""Check the nodes of a job in seconds, before it trains: started as its launcher, with the same arguments."""

import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.error import UserError
from megalite.exit_status import FINISHED, MISTAKE, NODE
from megalite.training.command import build_parser, end, resolve
from megalite.training.environment import Environment, choose_cpu_accelerator, node_name, store_is_served

if TYPE_CHECKING:
    from megalite.preflight.verdict import Verdict

TIMEOUT_SECONDS = 60.0
Configured = tuple[RunConfig, DeepSpeedConfig] | str


def main(argv: list[str] | None = None) -> int:
    """Check; 0 where all is well, 2 after a mistake, 74 without room for a checkpoint, 77 for a bad node."""
    try:
        environment = Environment.read()
    except UserError as error:
        return tell(str(error), MISTAKE)
    options = Namespace(timeout=TIMEOUT_SECONDS, nodes=[], bad_nodes=None)
    try:
        parser().parse_intermixed_args(argv, options)
        configured: Configured = resolve(options, environment.world_size, options.task)
    except UserError as error:  # rank 0 tells it once for all ranks that make it
        configured = str(error)
    return preflight(configured, options, environment)


def parser() -> ArgumentParser:
    """The launchers' command line, and what is the preflight's own."""
    command = build_parser(__doc__)
    add = command.add_argument
    task = "what the run's launcher trains (default: %(default)s)"
    add("--task", choices=("pretrain", "finetune", "prefer"), default="pretrain", help=task)
    wait = "how long a rank is waited for (default: %(default)s)"
    add("--timeout", type=float, default=TIMEOUT_SECONDS, metavar="SECONDS", help=wait)
    names = "the nodes in the order of their ranks: so that one whose ranks do not come has a name"
    add("--nodes", type=lambda text: text.split(","), default=[], metavar="NAME,...", help=names)
    add("--bad-nodes", type=Path, metavar="FILE", help="receives the names of bad nodes, one per line")
    return command


def preflight(configured: Configured, options: Namespace, environment: Environment) -> int:
    """Meet the other ranks and check; `configured` is the job, or why this rank has none."""
    import torch

    if not torch.cuda.is_available():
        choose_cpu_accelerator()
    from megalite.preflight.course import Job, check_job, report_mistake
    from megalite.preflight.meeting import Meeting, open_store
    from megalite.preflight.verdict import Verdict
    from megalite.training.processes import choose_device

    rank, world_size, node = environment.rank, environment.world_size, node_name()
    verdict = Verdict(world_size, environment.local_world_size, options.nodes)
    serves = rank == 0 and not store_is_served()
    address, port = environment.master_addr, environment.master_port
    try:
        store = open_store(address, port, serves=serves, seconds=options.timeout)
        meeting = Meeting(store, rank, world_size, options.timeout)
        if isinstance(configured, str):
            status = report_mistake(configured, node, meeting, verdict)
        else:
            job = Job(*configured, node, partial(choose_device, environment))
            status = check_job(job, meeting, verdict)
    except UserError as error:
        status = MISTAKE if serves else NODE  # a port that is taken, or no way to rank 0
        return tell(str(error), status) if rank <= 1 else status
    if rank == 0:
        conclude(verdict, options.bad_nodes)
    meeting.leave()
    return status


def conclude(verdict: "Verdict", bad_nodes: Path | None) -> None:
    """Say what was found, and write down which nodes to do without."""
    from megalite.preflight.verdict import table

    if verdict.healths:
        print(table(verdict), flush=True)
    for fault in verdict.faults:
        tell(fault.text, fault.status)
    if verdict.status == NODE and bad_nodes:
        bad_nodes.write_text("".join(f"{node}\n" for node in verdict.bad_nodes), encoding="utf-8")
    if verdict.status == FINISHED:
        print("preflight: all is well", flush=True)


def tell(line: str, status: int) -> int:
    """One line for a person; the exit status, handed on."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    end(main())
