"""The processes of a job: they meet, work, and end together."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from megalite.error import UserError, exit_status_of, told_to_users
from megalite.training.environment import Environment, cpu_is_chosen, threads_are_set
from megalite.training.world import JobError
from megalite.watch.liveness import Liveness
from megalite.watch.server import leave
from megalite.watch.witness import HangWatch

Result = TypeVar("Result")
DEATH_SECONDS = 1.0  # in which a rank's death is known to all


def run_job(
    environment: Environment, job: Callable[[torch.device], Result], hang_watch: HangWatch | None = None
) -> Result:
    """What job(device) gives, on every rank of a launch. An error on one rank ends it on all, in one line.

    hang_watch: by which a rank that makes no progress does the same.
    """
    with processes(environment, hang_watch) as (device, liveness):
        try:
            result = job(device)
        except Exception as error:
            line = told_to_users(error)
            if line is None:
                time.sleep(DEATH_SECONDS)  # a rank that died breaks our connections: then we end here
                sys.excepthook(type(error), error, error.__traceback__)  # ours to mend: show where
            liveness.failed(line or f"{type(error).__name__}: {error}", exit_status_of(error))
    return result


@contextmanager
def processes(
    environment: Environment, hang_watch: HangWatch | None = None
) -> Iterator[tuple[torch.device, Liveness]]:
    """The process group of all ranks, watched: a rank that dies or hangs ends the job, with its name."""
    try:
        device = choose_device(environment)
        liveness = _meet(environment, device, hang_watch)
    except dist.DistNetworkError as error:
        where = f"{environment.master_addr}:{environment.master_port}"
        reason = str(error).rpartition("message: ")[2]
        leave(
            f"ranks cannot meet at {where}: {reason}: choose another MASTER_PORT (deepspeed --master_port N)"
        )
    except UserError as error:
        leave(str(error))
    yield device, liveness
    dist.barrier()
    liveness.close()
    dist.destroy_process_group()


def _meet(environment: Environment, device: torch.device, hang_watch: HangWatch | None) -> Liveness:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def publish(address: str | None) -> str:
        box = [address]
        dist.broadcast_object_list(box, src=0, device=device)
        assert box[0] is not None
        return box[0]

    return Liveness.start(
        environment.rank,
        environment.world_size,
        publish,
        host=environment.master_addr,
        hang_watch=hang_watch,
    )


def choose_device(environment: Environment) -> torch.device:
    """This rank's device, as the current one. JobError where the node has fewer GPUs than ranks."""
    if torch.cuda.is_available() and not cpu_is_chosen():
        if environment.local_rank >= torch.cuda.device_count():
            raise JobError(
                f"local rank {environment.local_rank} of this node has no GPU, there are "
                f"{torch.cuda.device_count()}: start as many processes, or set DS_ACCELERATOR=cpu"
            )
        torch.cuda.set_device(environment.local_rank)
        return torch.device("cuda", environment.local_rank)
    if not threads_are_set():
        torch.set_num_threads(max(1, torch.get_num_threads() // environment.local_world_size))
    return torch.device("cpu")
