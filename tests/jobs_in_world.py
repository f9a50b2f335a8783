"""A job from its configuration to its last checkpoint, as a rank of tests/harness.py."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.exit_status import FINISHED
from megalite.training.environment import Environment
from megalite.training.job import train_together
from megalite.training.stopping import Signals, Stopping
from megalite.watch.marks import Marks

CPU = torch.device("cpu")


def run_job(rank: int, run: RunConfig, deepspeed: DeepSpeedConfig) -> None:
    """To its last step. Collective; communication is initialized."""
    world_size = dist.get_world_size()
    here = Environment(rank, rank, world_size, world_size, master_addr="", master_port=0)
    stopping = Stopping(Path(run.output_dir), None, Signals(), CPU, time.monotonic())
    assert train_together(run, deepspeed, here, CPU, stopping, Marks("start-up")) == FINISHED
