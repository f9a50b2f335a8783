"""Pre-train a Llama decoder: one process per device, started by deepspeed, torchrun or srun.

deepspeed launchers/pretrain.py --deepspeed_config configs/deepspeed/zero3.json parallel.tp_size=2
"""

from megalite.training.command import end, launch


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    return launch(__doc__, "pretrain", argv)


if __name__ == "__main__":
    end(main())
