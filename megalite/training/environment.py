"""What the launcher tells this process; the only reader of os.environ."""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """This process among those of the job, as torchrun, deepspeed and srun scripts name it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str

    @classmethod
    def read(cls) -> "Environment":
        """Read RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR; without them this is a job of one process.

        Raises ValueError when only some of them are there.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if len(missing) == len(names):
            os.environ |= dict(zip(names, ("0", "0", "1", "127.0.0.1", str(_free_port())), strict=True))
        elif missing:
            raise ValueError(
                f"the environment has {', '.join(n for n in names if n not in missing)} but not "
                f"{', '.join(missing)}: start with deepspeed, torchrun, or the scripts in slurm/"
            )
        world_size = int(os.environ["WORLD_SIZE"])
        # deepspeed, torchrun and Slurm each have their own name for the processes of this node
        local = [os.environ.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")]
        return cls(
            rank=int(os.environ["RANK"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            world_size=world_size,
            local_world_size=int(next((size for size in local if size), world_size)),
            master_addr=os.environ["MASTER_ADDR"],
        )


def choose_cpu_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, that there is no GPU to look for."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def threads_are_set() -> bool:
    """Whether the user has chosen the number of threads of a process."""
    return "OMP_NUM_THREADS" in os.environ


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
