"""A pre-training job, from its configuration to its last checkpoint, on one of its ranks."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.corpus import prepare_default_data
from megalite.data.datasets import Datasets
from megalite.data.fingerprint import describe_data
from megalite.data.loader import Batches, BatchLoader, PreparedBatches, check_vocabulary
from megalite.measure.hardware import peak_flops_per_second
from megalite.measure.metrics import Metrics, Workload
from megalite.measure.progress import Progress
from megalite.measure.report import describe_memory, describe_run, peak_memory_bytes
from megalite.model.flops import flops_per_token
from megalite.optimizer.recipe import state_bytes
from megalite.parallel.context import ParallelContext
from megalite.tokenizer.load import load_tokenizer
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import TORCH_DTYPES, initialize_communication
from megalite.training.environment import Environment
from megalite.training.evaluation import LiveEvaluation
from megalite.training.loop import Data, train
from megalite.training.output import make_folder, write_configs
from megalite.training.processes import run_job
from megalite.training.samples import build_samples, open_cache, token_files
from megalite.training.trainer import StageTrainer, build_context
from megalite.training.world import JobError, gather, on_rank_0

DEFAULT_CORPUS_BYTES = 8 << 20


def pretrain(run: RunConfig, deepspeed: DeepSpeedConfig, environment: Environment) -> None:
    """Train `run` to its last step; called by every rank. An error on one rank ends the job on all."""

    def job(device: torch.device) -> None:
        initialize_communication()
        _pretrain(run, deepspeed, environment, device)

    run_job(environment, job)


def _pretrain(
    run: RunConfig, deepspeed: DeepSpeedConfig, environment: Environment, device: torch.device
) -> None:
    if deepspeed.precision == "fp16" and device.type == "cpu":
        raise JobError(
            "fp16 needs a GPU and this run is on a CPU: enable bf16 in the DeepSpeed JSON, or neither"
        )
    is_reporter = environment.rank == 0
    report = _say if is_reporter else _say_nothing
    context = build_context(run, environment.rank, environment.world_size, device)
    run = _with_data(run, context)
    has_bar = is_reporter and sys.stderr.isatty()  # a log file wants lines
    datasets = build_samples(run, deepspeed.train_batch_size, open_cache(run), progress=has_bar)
    data = _build_data(datasets, run, deepspeed, context)
    on_rank_0(context.rank, lambda: make_folder(run.output_dir))
    every_steps = run.logging.evaluate_every_steps
    evaluation = LiveEvaluation(run, environment.rank, report) if every_steps else None
    memory_at_start = gather(peak_memory_bytes(device))
    trainer = StageTrainer(run, deepspeed, context)
    checkpoints = Checkpoints(run, deepspeed, environment.rank, report, describe_data(datasets))
    last_step = checkpoints.resume(trainer.engine)
    if is_reporter:
        write_configs(run, deepspeed)
    metrics = _open_metrics(run, deepspeed, context, last_step, report)
    train(trainer, data, run, deepspeed, checkpoints, metrics, last_step + 1, evaluation)
    if metrics:
        metrics.close()
        report(metrics.summary())
    peaks = gather(peak_memory_bytes(device))
    optimizer_bytes = state_bytes(trainer.engine.recipe)
    report(describe_memory(run, deepspeed, context, memory_at_start, peaks, optimizer_bytes))


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
    workload = Workload(
        samples_per_step=deepspeed.train_batch_size,
        tokens_per_sample=run.data.seq_length,
        flops_per_token=flops_per_token(run.model, run.data.seq_length),
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


def _with_data(run: RunConfig, context: ParallelContext) -> RunConfig:
    """The run with its default data made and named, where it names none."""
    if run.data.train is not None:
        return run

    def prepare() -> str:
        folder = make_folder(run.output_dir)
        return prepare_default_data(folder / "data", load_tokenizer("bytes"), DEFAULT_CORPUS_BYTES)

    prefix = on_rank_0(context.rank, prepare)
    data = run.data.model_copy(update={"train": [prefix], "tokenizer": "bytes"})
    return run.model_copy(update={"data": data})


def _build_data(
    datasets: Datasets, run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext
) -> Data:
    def check_ids() -> None:
        for indexed in token_files(datasets):
            check_vocabulary(indexed, run.model.vocab_size)

    on_rank_0(context.rank, check_ids)

    stages = context["pp"]
    ends = (0, stages.size - 1)

    def batches(dataset: Any) -> Batches:
        loader = BatchLoader(
            dataset,
            global_batch_samples=deepspeed.train_batch_size,
            num_micro_batches=deepspeed.num_micro_batches(context["dp"].size),
            dp_rank=context["dp"].rank,
            dp_size=context["dp"].size,
            vocab_size=run.model.vocab_size,
            mask_documents=run.data.mask_documents,
            reads_tokens=stages.rank in ends,
        )
        return PreparedBatches(loader)

    validation = batches(datasets.validation) if datasets.validation is not None else None
    return Data(batches(datasets.train), validation)


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    """What ranks that do not report do with a report."""
