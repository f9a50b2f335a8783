"""One rank's part of a model in training: its stage, its engine, and the runner that drives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
import torch.distributed as dist

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.model.attention import kv_replicas
from megalite.model.layout import StageLayout
from megalite.model.llama import LlamaStage
from megalite.parallel.context import ParallelContext
from megalite.parallel.topology import Topology
from megalite.pipeline.p2p import Neighbours
from megalite.pipeline.partition import layers_of_stage
from megalite.pipeline.runner import MicroBatch, PipelineRunner
from megalite.pipeline.schedule import build_schedule, forward_only
from megalite.training.engine import StageEngine

Batch = Sequence[tuple[torch.Tensor, ...]]  # a MicroBatch's parts, for each micro batch


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step gave, the same on every rank: mean loss in nats, gradient norm unclipped."""

    loss: float
    grad_norm: float


def build_context(run: RunConfig, rank: int, world_size: int, device: torch.device) -> ParallelContext:
    """The process groups of a run; collective."""
    parallel = run.parallel
    return ParallelContext.build(
        Topology(world_size, parallel.tp_size, parallel.pp_size),
        rank,
        device,
        kv_replicas=kv_replicas(run.model.num_key_value_heads, parallel.tp_size),
    )


class Replica:
    """Trains and evaluates on micro batches; every rank calls the same methods at the same time."""

    def __init__(self, run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext) -> None:
        self.context = context
        parallel = run.parallel
        num_micro_batches = deepspeed.num_micro_batches(context.dp_size)
        sequence_parallel = parallel.sequence_parallel and context.tp_size > 1
        layout = StageLayout(context, sequence_parallel, parallel.recompute)
        layers = layers_of_stage(run.model.num_hidden_layers, context.pp_size, context.pp_rank)
        self.engine = StageEngine(
            lambda: LlamaStage(run.model, layout, layers=layers, seed=run.seed),
            run.optimizer,
            deepspeed,
            context,
            num_micro_batches=num_micro_batches,
            parameter_gathering=parallel.parameter_gathering,
        )
        local_length = run.data.seq_length // (context.tp_size if sequence_parallel else 1)
        shape = (local_length, deepspeed.train_micro_batch_size_per_gpu, run.model.hidden_size)
        self.runner = PipelineRunner(
            self.engine,
            Neighbours(context.pp_group, shape, self.engine.dtype, context.device),
            is_first=context.is_first_stage,
            is_last=context.is_last_stage,
        )
        stages = (context.pp_rank, context.pp_size)
        self._training = build_schedule(parallel.pipeline_schedule, *stages, num_micro_batches)
        self._evaluation = forward_only(*stages, num_micro_batches)

    def train_step(self, micro_batches: Batch, learning_rate: float) -> StepResult:
        """Take one optimizer step on a global batch, of which this rank is given its part."""
        self.engine.begin()
        loss = self.runner.train(self._training, self._on_device(micro_batches))
        grad_norm = self.engine.step(learning_rate)
        return StepResult(self._mean(loss), grad_norm)

    def evaluate(self, micro_batches: Batch) -> float:
        """The mean loss on a global batch; nothing is learnt."""
        self.engine.train(False)
        self.engine.begin()
        loss = self.runner.evaluate(self._evaluation, self._on_device(micro_batches))
        self.engine.train(True)
        return self._mean(loss)

    def _on_device(self, micro_batches: Batch) -> list[MicroBatch]:
        device = self.context.device
        return [MicroBatch(*(part.to(device) for part in parts)) for parts in micro_batches]

    def _mean(self, loss: torch.Tensor | None) -> float:
        """The last stage's loss, averaged over data-parallel ranks, on every rank of the world."""
        total = torch.zeros((), dtype=torch.float64, device=self.context.device)
        if loss is not None and self.context.tp_rank == 0:
            total += loss / self.context.dp_size
        dist.all_reduce(total)
        return total.item()


def require_finite(result: StepResult, step: int, precision: str) -> None:
    """Raise FloatingPointError on a loss or norm that is not a number; fp16 may skip a step by itself."""
    if not isfinite(result.loss) or (not isfinite(result.grad_norm) and precision != "fp16"):
        raise FloatingPointError(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: lower "
            "optimizer.learning_rate or lengthen schedule.warmup_steps, and start from an older checkpoint"
        )
