"""Pre-train a Llama decoder: one process per device, started by deepspeed, torchrun or srun.

deepspeed launchers/pretrain.py --deepspeed_config configs/deepspeed/zero3.json parallel.tp_size=2
"""

import os
import sys

from megalite.training.command import launch


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    return launch(__doc__, "pretrain", argv)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads outlive their groups, and abort an interpreter that shuts down slowly
