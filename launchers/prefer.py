"""Tune a model to prefer the better of two answers, by DPO or SimPO, or good answers to bad ones, by KTO.

One process per device:

deepspeed launchers/prefer.py --deepspeed_config configs/deepspeed/zero3.json \
          checkpoint.start_from=runs/tuned data.train=pairs.jsonl
"""

from megalite.training.command import end, launch


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    return launch(__doc__, "prefer", argv)


if __name__ == "__main__":
    end(main())
