"""The command line that the launchers share: what is to be trained, checked before anything else is done."""

import gc
import os
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megalite.config.deepspeed import DeepSpeedConfig, load_deepspeed
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.config.section import ConfigError
from megalite.config.tuning import LoraConfig
from megalite.error import UserError
from megalite.exit_status import FINISHED, MISTAKE
from megalite.model.table import adaptable_layers
from megalite.pipeline.schedule import rule_of
from megalite.plan.layout import check_stages
from megalite.training.environment import Environment, choose_cpu_accelerator

EPILOG = """The JSON owns batch sizes, precision, ZeRO and gradient clipping; the YAML owns the rest.
docs/configuration.md lists every key. Without a launcher this is a run of one process."""


class Parser(ArgumentParser):
    """Raises what argparse would print, usage and all, on every rank."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see --help")


def build_parser(description: str | None) -> ArgumentParser:
    """The command line; docs/configuration.md lists what can be overridden."""
    parser = Parser(description=description, epilog=EPILOG, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="DeepSpeed configuration")
    parser.add_argument("--config", nargs="?", metavar="YAML", help="the run (default: a small one)")
    check = "check the command for as many processes as WORLD_SIZE says, and end"
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--local_rank", type=int, help=SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the run")
    return parser


def configure(
    argv: list[str] | None, world_size: int, task: str, description: str | None = None
) -> tuple[RunConfig, DeepSpeedConfig]:
    """What a command line says, see `resolve`."""
    return resolve(build_parser(description).parse_intermixed_args(argv), world_size, task)


def resolve(args: Namespace, world_size: int, task: str) -> tuple[RunConfig, DeepSpeedConfig]:
    """The run and the DeepSpeed configuration, checked against each other and the number of processes.

    task: what the launcher trains; a run that says another is refused.
    """
    if args.config and "=" in args.config and not Path(args.config).exists():
        args.overrides.insert(0, args.config)  # it follows a bare --config
        args.config = None
    run = load_run(args.config, args.overrides, args.deepspeed_config)
    run = _of_task(run, task)
    known = {"dp_size": run.dp_size_of(world_size), "hidden_size": run.model.hidden_size}
    deepspeed = load_deepspeed(args.deepspeed_config, args.config or "the run", **known)
    run.check_zero_stage(deepspeed.zero_stage)
    tokens = deepspeed.train_micro_batch_size_per_gpu * run.tokens_per_sample // run.parallel.cp_size
    run.fp8.check_precision(deepspeed.precision)
    run.kernels.check_precision(deepspeed.precision)
    run.fp8.check_sizes(run.model, run.parallel.tp_size, tokens)
    run.check_zero_options(deepspeed.raw)
    check_stages(run)
    _check_split_backward(run)
    run.check_optimizer(deepspeed.raw)
    _check_targets(run)
    return run, deepspeed


def _check_split_backward(run: RunConfig) -> None:
    """Raise ConfigError for frozen weights under a schedule that computes the gradients of weights apart."""
    name = run.parallel.pipeline_schedule
    if run.lora.rank and rule_of(name).splits_backward:
        raise ConfigError(
            f"lora.rank {run.lora.rank} freezes weights, and pipeline_schedule {name} computes their "
            "gradients apart: choose 1f1b, afab or interleaved"
        )


def _check_targets(run: RunConfig) -> None:
    """Raise ConfigError for adapters of layers that the model does not have.

    The default names what a Llama has; a model with experts may have a part of that.
    """
    layers = adaptable_layers(run.model)
    missing = [target for target in run.lora.targets if target not in layers]
    if run.lora.rank and (missing or not run.lora.targets) and run.lora.targets != LoraConfig().targets:
        named = f"names {missing[0]!r}, and the model" if missing else "names nothing, and the model"
        raise ConfigError(f"lora.targets {named} has {', '.join(layers)}: choose among these")


def _of_task(run: RunConfig, task: str) -> RunConfig:
    if "task" in run.model_fields_set and run.task != task:
        raise ConfigError(
            f"the run's task is {run.task!r} and this launcher's {task!r}: start launchers/{run.task}.py"
        )
    if task == "pretrain":
        return run
    from megalite.training.start import with_model_of_start  # takes torch

    return with_model_of_start(run.model_copy(update={"task": task}))


def end(status: int) -> NoReturn:
    """End this process at once: gloo's threads outlive their groups, and abort a slow shut-down."""
    sys.stdout.flush()
    os._exit(status)


@contextmanager
def garbage_left() -> Iterator[None]:
    """No collection of garbage while modules are imported, and none of what they made afterwards.

    That is some 300,000 objects, which live as long as the process: looking through them over and over takes
    a fifth of the time of imports, and some of every full collection afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def launch(description: str | None, task: str, argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    rank = 0  # until it is known: then one rank speaks for all, since all find the same mistakes
    try:
        environment = Environment.read()
        rank = environment.rank
        args = build_parser(description).parse_intermixed_args(argv)
        run, deepspeed = resolve(args, environment.world_size, task)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        time.sleep(0 if rank == 0 else 5)  # a launcher ends all ranks when the first one leaves
        return MISTAKE
    if args.check:
        return FINISHED
    with garbage_left():
        import torch  # the configuration is checked first: a mistake is told in a second, not in ten

        if not torch.cuda.is_available():
            choose_cpu_accelerator()
        from megalite.training.job import run_training

    return run_training(run, deepspeed, environment)
