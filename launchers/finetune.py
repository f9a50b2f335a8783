"""Fine-tune a checkpoint or a Hugging Face folder on conversations: one process per device.

deepspeed launchers/finetune.py --deepspeed_config configs/deepspeed/zero3.json \
          checkpoint.start_from=runs/first data.train=chats.jsonl
"""

from megalite.training.command import end, launch


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    return launch(__doc__, "finetune", argv)


if __name__ == "__main__":
    end(main())
