"""Plan a run on paper: what fits, how fast it is, how long it takes. Needs no GPU, and no torch."""

import argparse
import json
import sys
from pathlib import Path

from megalite.config.deepspeed import load_deepspeed
from megalite.config.device import DeviceConfig, dump_device, load_device
from megalite.config.load import load_run
from megalite.error import UserError, run_command
from megalite.files import write_text
from megalite.measure.efficiency import Comparison, compare_with_run
from megalite.plan.found import page_of_search, search_as_json, write_configs
from megalite.plan.job import Job
from megalite.plan.page import page_of
from megalite.plan.plan import make_plan
from megalite.plan.search import search_layouts

DEVICES = Path(__file__).parent.parent / "configs" / "devices"


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_command(lambda: plan_run(arguments))


def parser() -> argparse.ArgumentParser:
    known = ", ".join(sorted(path.stem for path in DEVICES.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES
    )
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--config", metavar="FILE", help="YAML of the run (default: the embedded run)")
    add("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON of the run; --measure has its own")
    add("--nodes", type=int, default=1, metavar="N", help=f"nodes {shown}")
    add("--gpus-per-node", type=int, default=8, metavar="N", help=f"GPUs of each node {shown}")
    add("--device", default="a100-80", metavar="NAME", help=f"{known}, or a YAML of your own {shown}")
    add(
        "--search",
        action="store_true",
        help="look at all layouts of the run, in place of its own",
    )
    add("--best", type=int, default=5, metavar="N", help=f"layouts that a search tells {shown}")
    add("--output", type=Path, metavar="DIR", help="folder for the YAML and JSON of the best layouts")
    add("--measure", type=Path, metavar="RUN_DIR", help="compare the plan of this run with what it took")
    add("--write-device", type=Path, metavar="FILE", help="with --measure: the device as measured, as YAML")
    add("--json", action="store_true", help="print one JSON object in place of tables")
    add("overrides", nargs="*", metavar="section.key=value", help="changes of the run")
    return parser


EXAMPLES = """\
examples:
  what 70B does on 64 nodes of 8 A100:
    python tools/plan_run.py --deepspeed_config configs/deepspeed/llama3_70b.json \\
           --config configs/runs/llama3_70b.yaml --nodes 64
  the best layouts of 70B on 512 H100, as configs:
    python tools/plan_run.py --deepspeed_config configs/deepspeed/llama3_70b.json \\
           --config configs/runs/llama3_70b.yaml --nodes 64 --device h100 --search --output plans/70b
  how far a plan was off, and the device as it is:
    python tools/plan_run.py --measure runs/pretrain_460m --nodes 2 --write-device our_a100.yaml
"""


def plan_run(arguments: argparse.Namespace) -> None:
    """Print what the arguments ask for."""
    check(arguments)
    job = job_of(arguments)
    if arguments.measure:
        tell_measured(job, arguments)
    elif arguments.search:
        tell_search(job, arguments)
    else:
        plan = make_plan(job)
        print(json.dumps(plan.to_json(), indent=2) if arguments.json else page_of(plan))


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for what does not go together."""
    for name in ("nodes", "gpus_per_node", "best"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give at least 1")
    if not arguments.measure and not arguments.deepspeed_config:
        raise UserError("no --deepspeed_config: it states the batch, precision and ZeRO of the run")
    if arguments.output and not arguments.search:
        raise UserError("--output takes the configs that --search finds: add --search, or leave it out")
    if arguments.write_device and not arguments.measure:
        raise UserError("--write-device takes what --measure finds: add --measure RUN_DIR, or leave it out")


def job_of(arguments: argparse.Namespace) -> Job:
    """The run on the machine. Raises UserError, in one line, for what does not exist."""
    config, json_file = arguments.config, arguments.deepspeed_config
    if arguments.measure:
        config, json_file = str(arguments.measure / "config.yaml"), str(arguments.measure / "deepspeed.json")
    run = load_run(config, arguments.overrides, json_file)
    device = device_of(arguments.device)
    dp_size = None if arguments.search else run.dp_size_of(arguments.nodes * arguments.gpus_per_node)
    where = config or "the run"
    deepspeed = load_deepspeed(json_file, where, dp_size=dp_size, hidden_size=run.model.hidden_size)
    return Job(run, deepspeed, device, arguments.nodes, arguments.gpus_per_node)


def device_of(name: str) -> DeviceConfig:
    """One of ours by its name, or a file."""
    return load_device(name if name.endswith((".yaml", ".yml")) else DEVICES / f"{name}.yaml")


def tell_search(job: Job, arguments: argparse.Namespace) -> None:
    """Print the best layouts, and write them where --output says."""
    search = search_layouts(job, arguments.best)
    print(json.dumps(search_as_json(search), indent=2) if arguments.json else page_of_search(search))
    if arguments.output:
        commands = write_configs(search, arguments.output)
        print(
            f"\nwrote {len(commands)} configs to {arguments.output}; the first:\n{commands[0]}",
            file=sys.stderr,
        )


def tell_measured(job: Job, arguments: argparse.Namespace) -> None:
    """Print how far the plan was off, and write the device where --write-device says."""
    found = compare_with_run(job, arguments.measure)
    values = {
        "planned_step_seconds": found.planned.total,
        "measured_step_seconds": found.measured_seconds,
        "num_steps": found.num_steps,
        "error": found.error,
        "matmul_efficiency": found.device.matmul_efficiency,
        "planned_waiting": found.planned_waiting,
        "measured_waiting": found.measured_waiting,
    }
    print(json.dumps(values, indent=2) if arguments.json else page_of_comparison(found, job))
    if arguments.write_device:
        write_text(arguments.write_device, dump_device(found.device))
        print(f"wrote {arguments.write_device}", file=sys.stderr)


def page_of_comparison(found: Comparison, job: Job) -> str:
    """For people."""
    before, waiting = job.device.matmul_efficiency, found.measured_waiting
    lines = [
        f"planned   {found.planned.total:.4g} s per step with matmul_efficiency {before:.3g}",
        f"measured  {found.measured_seconds:.4g} s, the median of {found.num_steps} steps",
        f"error     {found.error:+.1%} of what was measured",
        f"fits      matmul_efficiency {found.device.matmul_efficiency:.3g}, all else as given",
    ]
    if waiting is not None:
        lines.append(f"waiting   {waiting:.1%} of the recorded step, planned {found.planned_waiting:.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
