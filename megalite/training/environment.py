"""What the launcher tells this process; the only reader of os.environ."""

import os
import socket
from dataclasses import dataclass

from megalite.error import UserError


class LaunchError(UserError):
    """What the launcher left in the environment does not fit together."""


@dataclass(frozen=True)
class Environment:
    """This process among those of the job, as torchrun, deepspeed and srun scripts name it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    @classmethod
    def read(cls) -> "Environment":
        """Read RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; without them this is a job of one.

        Raises LaunchError when only some of them are there, or they are not such numbers.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if len(missing) == len(names):
            os.environ |= dict(zip(names, ("0", "0", "1", "127.0.0.1", str(_free_port())), strict=True))
        elif missing:
            raise LaunchError(
                f"the environment has {', '.join(n for n in names if n not in missing)} but not "
                f"{', '.join(missing)}: start with deepspeed, torchrun, or the scripts in slurm/"
            )
        rank, world_size = _number("RANK"), _number("WORLD_SIZE")
        if rank >= world_size:
            raise LaunchError(f"RANK {rank} of WORLD_SIZE {world_size}: ranks run from 0 to {world_size - 1}")
        # deepspeed, torchrun and Slurm each have their own name for the processes of this node
        local = [os.environ.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")]
        return cls(
            rank=rank,
            local_rank=_number("LOCAL_RANK"),
            world_size=world_size,
            local_world_size=int(next((size for size in local if size), world_size)),
            master_addr=os.environ["MASTER_ADDR"],
            master_port=_number("MASTER_PORT"),
        )


def is_one_of_many() -> bool:
    """Whether a launcher has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def node_name() -> str:
    """The node that this process runs on, by the name that the batch system calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def store_is_served() -> bool:
    """Whether torchrun itself serves the store at MASTER_ADDR:MASTER_PORT, where rank 0 would."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def choose_cpu_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, that there is no GPU to look for."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def cpu_is_chosen() -> bool:
    """Whether the ranks are to run on the CPU, even if there is a GPU."""
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def silence_profiler() -> None:
    """Let torch's profiler not tell of itself on standard error; nothing else speaks at so high a level."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def threads_are_set() -> bool:
    """Whether the user has chosen the number of threads of a process."""
    return "OMP_NUM_THREADS" in os.environ


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise LaunchError(f"{name} is {text!r} in the environment: expected a whole number")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
