"""The course of a preflight on one rank: three rounds, after each of which rank 0 says whether to go on.

    who      every rank is there, with the same code, versions and configuration, and can read the data
    health   the run's folder is one for all and has room; each device is there, free, right, and not slow
    groups   a collective over every group of the run, right, and how fast

All that may hang is done within a time, and named where it does not end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.error import UserError
from megalite.exit_status import FINISHED, MISTAKE
from megalite.parallel.context import ParallelContext
from megalite.preflight.device import Multiply, ecc_problem, measure_product, memory_problem
from megalite.preflight.fault import Fault
from megalite.preflight.folder import Token, lack_of_space, unreadable
from megalite.preflight.groups import measure_groups
from megalite.preflight.inventory import Inventory, take_inventory
from megalite.preflight.meeting import Meeting, StuckError, within
from megalite.preflight.verdict import Values, Verdict
from megalite.training.layout import topology_of
from megalite.training.precision import TORCH_DTYPES


@dataclass(frozen=True)
class Job:
    """What is to run, and where this rank stands.

    choose_device: this rank's device; JobError where it has none.
    """

    run: RunConfig
    deepspeed: DeepSpeedConfig
    node: str
    choose_device: Callable[[], torch.device]


@dataclass(frozen=True)
class Probes:
    """What looks at a node; tests put faults here."""

    inventory: Callable[[RunConfig, DeepSpeedConfig], Inventory] = take_inventory
    multiply: Multiply = torch.mm
    seen_folder: Callable[[str], str] = str  # where this node sees output_dir
    measure_groups: Callable[..., dict[str, float]] = measure_groups


def check_job(job: Job, meeting: Meeting, verdict: Verdict, probes: Probes | None = None) -> int:
    """The exit status of a preflight, on every rank; rank 0's verdict holds the reasons. Collective."""
    probes = probes or Probes()
    tokens: list[Token] = []

    def judge_arrivals(values: Values) -> dict[str, Any]:
        verdict.judge_arrivals(values)
        if verdict.status == FINISHED:
            tokens.extend(_leave_token(job.run, verdict))
        return {"status": verdict.status, "token": tokens[0].text if tokens else ""}

    told = meeting.decide("who", _arrival(job, probes), judge_arrivals)
    if told["status"] != FINISHED:
        return told["status"]
    health = _health(job, meeting, probes, told["token"])
    status = _judged(meeting, "health", verdict.judge_health, verdict, health)
    for token in tokens:
        token.path.unlink(missing_ok=True)
    if status != FINISHED:
        return status
    return _judged(meeting, "groups", verdict.judge_groups, verdict, _groups(job, meeting, probes))


def report_mistake(mistake: str, node: str, meeting: Meeting, verdict: Verdict) -> int:
    """Tell rank 0 why this rank cannot take part; the exit status."""
    meeting.decide("who", {"node": node, "mistake": mistake}, verdict.judge_arrivals)
    return MISTAKE


def _judged(
    meeting: Meeting, topic: str, judge: Callable[[Values], None], verdict: Verdict, value: dict[str, Any]
) -> int:
    def judged(values: Values) -> int:
        judge(values)
        return verdict.status

    return meeting.decide(topic, value, judged)


def _leave_token(run: RunConfig, verdict: Verdict) -> list[Token]:
    try:
        token = Token.leave(run.output_dir)
    except UserError as error:
        verdict.faults.append(Fault(MISTAKE, str(error)))
        return []
    verdict.faults += lack_of_space(run)
    return [token]


def _arrival(job: Job, probes: Probes) -> dict[str, Any]:
    return {
        "node": job.node,
        "inventory": probes.inventory(job.run, job.deepspeed),
        "unreadable": unreadable(job.run),
    }


def _health(job: Job, meeting: Meeting, probes: Probes, token: str) -> dict[str, Any]:
    """What this rank finds: `problems` that are its node's, and what it measures."""
    value: dict[str, Any] = {"problems": [], "unreadable": {}}
    output_dir = job.run.output_dir
    seconds = meeting.seconds / 3  # so that what is stuck is told before the rank is missed
    try:
        seen = Token(Path(probes.seen_folder(output_dir)), token)
        problem = within(seconds, f"reading {output_dir}", partial(seen.problem, seconds / 2))
        if problem:
            value["unreadable"] = {f"output_dir {output_dir}": problem}
        value |= within(seconds, "measuring the device", partial(_measure_device, job, probes))
    except (
        StuckError,
        RuntimeError,
        UserError,
    ) as error:  # what CUDA says of a sick device is a RuntimeError
        value["problems"].append(_line(error))
    return value


def _measure_device(job: Job, probes: Probes) -> dict[str, Any]:
    device = job.choose_device()
    problems, on_gpu = [], device.type == "cuda"
    if on_gpu:
        problems += [memory_problem(*torch.cuda.mem_get_info(device)), ecc_problem(device)]
    dtype = TORCH_DTYPES[job.deepspeed.precision] if on_gpu else torch.float32
    product = measure_product(device, dtype, probes.multiply)
    if not product.is_right:
        problems.append("a matrix product is wrong")
    return {
        "problems": [problem for problem in problems if problem],
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "flops_per_second": product.flops_per_second,
    }


def _groups(job: Job, meeting: Meeting, probes: Probes) -> dict[str, Any]:
    """`bandwidths` of this rank's groups, `problems`, and `stuck`: the group in which it did not come on."""
    entered = ["all ranks"]

    def measure() -> dict[str, float]:
        device = job.choose_device()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("groups", meeting.store),
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=timedelta(seconds=2 * meeting.seconds),  # ours comes first
        )
        context = ParallelContext.build(topology_of(job.run, meeting.world_size), meeting.rank, device)
        return probes.measure_groups(context, entered.append)

    value: dict[str, Any] = {"bandwidths": {}, "problems": [], "stuck": ""}
    try:
        value["bandwidths"] = within(meeting.seconds / 2, "a collective", measure)
    except StuckError:
        value["stuck"] = entered[-1]
    except RuntimeError as error:  # what torch says where a connection fails
        value["problems"].append(_line(error))
    return value


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
