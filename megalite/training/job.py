"""A training job, from its configuration to its last checkpoint, on one of its ranks."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.format import CheckpointError
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.exit_status import FINISHED, NO_PROGRESS, STOPPED, STORAGE
from megalite.files import write_text
from megalite.measure.allocator import give_back
from megalite.measure.hardware import peak_flops_per_second
from megalite.measure.memory import SteadyPeak
from megalite.measure.memory_table import (
    MEMORY_FILE,
    RankMemory,
    describe_memory,
    describe_plan,
    fullest_plan,
)
from megalite.measure.metrics import Metrics, Workload
from megalite.measure.progress import Progress
from megalite.measure.report import describe_run
from megalite.model.flops import flops_per_token, forward_flops_per_token
from megalite.parallel.context import ParallelContext
from megalite.parallel.fp8 import choose_recipe
from megalite.plan.memory import plan_memory
from megalite.training.checkpoints import Checkpoints, find_newest
from megalite.training.course import Course
from megalite.training.data import open_data, with_references
from megalite.training.engine import initialize_communication
from megalite.training.environment import Environment, node_name
from megalite.training.evaluation import LiveEvaluation
from megalite.training.guard import Guard
from megalite.training.loop import train
from megalite.training.memory import settle_memory, state_of_engine
from megalite.training.node_disk import open_disk
from megalite.training.output import make_folder, write_configs
from megalite.training.places import Place, hang_watch
from megalite.training.precision import TORCH_DTYPES
from megalite.training.processes import run_job
from megalite.training.saving import Saving
from megalite.training.starts import note_start
from megalite.training.stopping import Request, Signals, Stopping
from megalite.training.timeline import StepTimeline
from megalite.training.trainer import StageTrainer, build_context, named_kernels
from megalite.training.world import JobError, gather, on_rank_0
from megalite.watch.marks import Marks


def run_training(run: RunConfig, deepspeed: DeepSpeedConfig, environment: Environment) -> int:
    """Train `run` to its last step, or to a stop; called by every rank. The exit status of each.

    An error on one rank ends the job on all.
    """
    signals = Signals()
    started_at = time.monotonic()
    marks = Marks(Place.START_UP)

    def job(device: torch.device) -> int:
        initialize_communication()
        minutes, run_dir = run.stop.after_minutes, Path(run.output_dir)
        stopping = Stopping(run_dir, minutes, signals, device, started_at)
        return train_together(run, deepspeed, environment, device, stopping, marks)

    status = run_job(environment, job, hang_watch(run, marks))
    signals.ignore()  # Slurm ends ranks that have not yet left when the first one has
    return status


def train_together(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    environment: Environment,
    device: torch.device,
    stopping: Stopping,
    marks: Marks,
) -> int:
    """The same among processes that have met and initialized communication; collective."""
    if deepspeed.precision == "fp16" and device.type == "cpu":
        raise JobError(
            "fp16 needs a GPU and this run is on a CPU: enable bf16 in the DeepSpeed JSON, or neither"
        )
    choose_recipe(run.fp8.recipe, device, deepspeed.precision)  # refused before anything is written
    kernels = named_kernels(run, device)  # so are these
    is_reporter = environment.rank == 0
    report = _say if is_reporter else _say_nothing
    context = build_context(run, environment.rank, environment.world_size, device)
    has_bar = is_reporter and sys.stderr.isatty()  # a log file wants lines
    disk = open_disk(run, environment.rank, node_name())
    newest = find_newest(run, environment.rank, report, disk)
    course = Course.after(newest.state, deepspeed.train_batch_size)
    refusal = on_rank_0(context.rank, lambda: _note_start(run, course.step))
    if refusal:
        _tell(f"error: {refusal}", is_reporter)
        return NO_PROGRESS
    num_samples = course.end_of(run.schedule.num_steps + run.guard.most_rollbacks)
    run, data = open_data(run, deepspeed, context, num_samples, newest, report, has_bar)
    on_rank_0(context.rank, lambda: make_folder(run.output_dir))
    every_steps = run.logging.evaluate_every_steps
    evaluation = LiveEvaluation(run, environment.rank, report) if every_steps else None
    keeps_blocks = settle_memory(run, deepspeed, context, environment.local_world_size)
    peak = SteadyPeak(device)
    trainer = StageTrainer(run, deepspeed, context, kernels=kernels)
    checkpoints = Checkpoints(run, deepspeed, context.rank, report, data.description, newest, disk)
    data = with_references(data, run, deepspeed, trainer, checkpoints, report)
    last_step = checkpoints.resume(trainer.engine)
    give_back()  # what construction and reading took for a while
    if is_reporter:
        write_configs(run, deepspeed)
    products = "" if run.fp8.recipe == "none" else f", products of linear layers fp8 {run.fp8.recipe}"
    report(f"kernels  {kernels.names}{products}")
    metrics = _open_metrics(run, deepspeed, context, last_step, report)
    saving = Saving(checkpoints, run.checkpoint, report)
    guard = Guard(run.guard, report, scales_loss=deepspeed.precision == "fp16")
    guard.restore(newest.state.get("guard", {}))
    hooks: dict[str, Any] = {"mark": partial(_mark, marks, peak), "record_step": _timeline(run, trainer)}
    request, failure = None, None
    try:
        request = train(trainer, data, run, course, guard, saving, stopping, metrics, evaluation, **hooks)
        failure = saving.failure
    except CheckpointError as error:  # on all ranks alike: what cannot be saved is to stop the run
        failure = error
    marks(Place.ENDING)
    if metrics:
        metrics.close()
        report(metrics.summary())
    report(_conclude_memory(run, deepspeed, trainer, peak, keeps_blocks=keeps_blocks))
    return _end(request, failure, is_reporter)


def _mark(marks: Marks, peak: SteadyPeak, place: Place, step: int) -> None:
    """A place of the loop: to the watch, and to the measure of memory."""
    marks(place, step)
    peak.reached(step)


def _conclude_memory(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    trainer: StageTrainer,
    peak: SteadyPeak,
    *,
    keeps_blocks: bool,
) -> str:
    """The table of what each byte was for; rank 0 writes all ranks' into the run's folder. Collective."""
    context = trainer.context
    place, device = (context.topology.world_size, context.rank), context.device.type
    planned = plan_memory(run, deepspeed, *place, device=device)
    own = RankMemory(
        context.rank, planned, state_of_engine(trainer.engine), peak.at_start_bytes, peak.grown_bytes
    )
    ranks = gather(own)
    if context.rank == 0:
        told = [rank.as_json() for rank in ranks]
        write_text(Path(run.output_dir, MEMORY_FILE), json.dumps({"ranks": told}, indent=1) + "\n")
    return describe_memory(ranks, keeps_blocks=any(gather(keeps_blocks)))


def _end(request: Request | None, failure: CheckpointError | None, is_reporter: bool) -> int:
    """The exit status of a run that ended in order, with a line where it is not complete."""
    if failure is None and request is None:
        return FINISHED
    if request is None or failure is not None:
        _tell(f"error: {failure}", is_reporter)
        return STORAGE
    asked = f"{request.reason} (rank {request.rank})"
    _tell(f"stopped by {asked}, and saved: the same command continues", is_reporter)
    return STOPPED


def _note_start(run: RunConfig, step: int) -> str | None:
    """Where starts are limited: why this one is too many. Elsewhere nothing is written yet."""
    if not run.stop.after_starts or step >= run.schedule.num_steps:
        return None
    return note_start(make_folder(run.output_dir), step, run.stop.after_starts)


def _tell(line: str, speaks: bool) -> None:
    if speaks:
        print(line, file=sys.stderr, flush=True)


def _open_metrics(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    context: ParallelContext,
    last_step: int,
    report: Callable[[str], None],
) -> Metrics | None:
    """The run's record, on rank 0; collective, since ranks that share cores are measured together."""
    options = run.logging
    peak = peak_flops_per_second(
        context.device, TORCH_DTYPES[deepspeed.precision], options.peak_tflops_per_device
    )
    peaks = gather(peak.flops_per_second)
    if context.rank != 0:
        return None
    report(describe_run(run, deepspeed, context, peak.source))
    report(describe_plan(*fullest_plan(run, deepspeed, context.topology.world_size, context.device.type)))
    workload = Workload(
        samples_per_step=deepspeed.train_batch_size,
        tokens_per_sample=run.tokens_per_sample,
        flops_per_token=_flops_per_token(run),
        peak_flops_per_second=sum(peaks),
    )
    progress = Progress(
        run.schedule.num_steps,
        last_step=last_step,
        every_steps=options.log_every_steps,
        bar=options.progress_bar,
    )
    return Metrics(
        Path(run.output_dir), workload, progress, last_step=last_step, tensorboard=options.tensorboard
    )


def _timeline(run: RunConfig, trainer: StageTrainer) -> StepTimeline:
    facts = {
        "pipeline_schedule": run.parallel.pipeline_schedule,
        "num_chunks": trainer.placement.num_chunks,
        "num_micro_batches": trainer.num_micro_batches,
    }
    return StepTimeline(run.logging.timeline_at_step, Path(run.output_dir), trainer.context, facts)


def _flops_per_token(run: RunConfig) -> int:
    """Of a step, per token that is trained on: KTO's mismatched rows, as many, go forward only."""
    work = (run.model, run.data.seq_length, run.lora)
    return flops_per_token(*work) + (forward_flops_per_token(*work) if run.has_mismatched_rows else 0)


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    """What ranks that do not report do with a report."""
