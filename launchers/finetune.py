"""Fine-tune a checkpoint or a Hugging Face folder on conversations: one process per device.

deepspeed launchers/finetune.py --deepspeed_config configs/deepspeed/zero3.json \
          checkpoint.start_from=runs/first data.train=chats.jsonl
"""

import os
import sys

from megalite.training.command import launch


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    return launch(__doc__, "finetune", argv)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads outlive their groups, and abort an interpreter that shuts down slowly
