"""Pre-train a Llama decoder: one process a device, started by deepspeed, torchrun or srun.

deepspeed --num_gpus 4 launchers/pretrain.py --deepspeed_config configs/deepspeed/zero3.json \
    --config configs/runs/pretrain_460m.yaml parallel.tp_size=2 schedule.num_steps=100
"""

import argparse
import sys
import time

from megalite.config.deepspeed import DeepSpeedConfig, load_deepspeed
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.training.environment import Environment, choose_cpu_accelerator


def build_parser() -> argparse.ArgumentParser:
    """The command line; docs/configuration.md lists what can be overridden."""
    parser = argparse.ArgumentParser(
        description="Pre-train a Llama decoder under tensor, sequence, pipeline and ZeRO data parallelism.",
        epilog="The DeepSpeed JSON owns batch sizes, precision, ZeRO and gradient clipping; the run's YAML "
        "owns the rest. docs/configuration.md lists every key. Ranks come from RANK, LOCAL_RANK, WORLD_SIZE, "
        "MASTER_ADDR and MASTER_PORT; without them this is a run of one process.",
    )
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="DeepSpeed configuration")
    parser.add_argument(
        "--config", nargs="?", metavar="YAML", help="the run (default: a small one, built in)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="changes to the run, for example parallel.tp_size=2 output_dir=runs/first",
    )
    return parser


def configure(args: argparse.Namespace, environment: Environment) -> tuple[RunConfig, DeepSpeedConfig]:
    """The run and the DeepSpeed configuration, checked against each other and the number of processes."""
    where = args.config or "the run"
    run = load_run(args.config, args.overrides, args.deepspeed_config)
    deepspeed = load_deepspeed(args.deepspeed_config, where)
    run.check_world(environment.world_size)
    deepspeed.num_micro_batches(environment.world_size // (run.parallel.tp_size * run.parallel.pp_size))
    return run, deepspeed


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    args = build_parser().parse_intermixed_args(argv)
    environment = Environment.read()
    try:
        run, deepspeed = configure(args, environment)
    except ValueError as error:
        return refuse(error, environment)
    import torch  # the configuration is checked first: a mistake is told in a second, not in ten

    if not torch.cuda.is_available():
        choose_cpu_accelerator()
    from megalite.training.job import pretrain

    pretrain(run, deepspeed, environment)
    return 0


def refuse(error: ValueError, environment: Environment) -> int:
    """Say once what is wrong: every rank finds the same, and a launcher ends all when the first one leaves."""
    if environment.rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    return 2


if __name__ == "__main__":
    sys.exit(main())
