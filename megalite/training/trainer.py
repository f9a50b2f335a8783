"""One rank's part of a model in training: its stage, its engine, and the runner that drives them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist

from megalite.batch import Batch
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.error import UserError
from megalite.model.attention import kv_copies
from megalite.model.balancing import RULES, ExpertBalancing, ExpertLoad
from megalite.model.llama import LlamaStage
from megalite.model.preference import log_probabilities
from megalite.model.share import StageShare
from megalite.optimizer.recipes import build_recipe
from megalite.parallel.context import ParallelContext
from megalite.parallel.plan import LayerPlan, Lora
from megalite.parallel.topology import DATA_AXES, Topology
from megalite.pipeline.p2p import Peers
from megalite.pipeline.partition import layers_of_stage
from megalite.pipeline.runner import PipelineRunner
from megalite.pipeline.schedule import build_schedule, forward_only
from megalite.training.engine import StageEngine
from megalite.training.objective import build_objective


class DivergedError(UserError):
    """A loss or a gradient that is no number."""


@dataclass(frozen=True)
class LossSum:
    """A sum of losses in nats, and what it is to be divided by; over any number of batches and ranks.

    further: sums of what else is told, by name.
    """

    total: float = 0.0
    count: float = 0.0
    further: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "LossSum") -> "LossSum":
        further = {name: value + self.further.get(name, 0.0) for name, value in other.further.items()}
        return LossSum(self.total + other.total, self.count + other.count, further)

    @property
    def mean(self) -> float:
        """Nats per label, or pair, that counts; not a number where none does."""
        return self.total / self.count if self.count else float("nan")

    @property
    def further_means(self) -> dict[str, float]:
        """The same of the further sums."""
        return {name: value / self.count for name, value in self.further.items() if self.count}


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step gave, the same on every rank: mean loss in nats, gradient norm unclipped.

    experts: what the routers did, where there are any.
    further: means of what else the objective tells, by name.
    """

    loss: float
    grad_norm: float
    experts: ExpertLoad | None = None
    further: Mapping[str, float] = field(default_factory=dict)


def build_context(run: RunConfig, rank: int, world_size: int, device: torch.device) -> ParallelContext:
    """The process groups of a run; collective."""
    tp_size, pp_size = run.parallel.tp_size, run.parallel.pp_size
    copies = kv_copies(run.model.num_key_value_heads, tp_size)
    sizes = {"tp_size": tp_size, "pp_size": pp_size, "ep_size": run.parallel.ep_size, "kv_copy_size": copies}
    topology = Topology(world_size, **sizes)
    return ParallelContext.build(topology, rank, device)


class StageTrainer:
    """Trains and evaluates on batches; every rank calls the same methods at the same time.

    The mean over labels, or pairs, is taken here alone: each stage with a head gives a sum, whose gradient is
    one over the count of the whole global batch, over micro batches and all ranks that see other data.
    """

    def __init__(self, run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext) -> None:
        self.context = context
        parallel, stages = run.parallel, context["pp"]
        num_micro_batches = deepspeed.num_micro_batches(context["dp"].size)
        self.sequence_parallel = sequence_parallel = parallel.sequence_parallel and context["tp"].size > 1
        plan = LayerPlan(context, sequence_parallel, lora=adapters_of(run))
        self.share = share_of_stage(run, context)
        self.objective = build_objective(run, context)
        options: dict[str, Any] = {"seed": run.seed, "recompute": parallel.recompute}
        self.engine = StageEngine(
            lambda: [LlamaStage(run.model, plan, self.share, loss=self.objective.loss, **options)],
            build_recipe(run.optimizer),
            deepspeed,
            context,
            num_micro_batches=num_micro_batches,
            parameter_gathering=parallel.parameter_gathering,
        )
        local_length = run.data.seq_length // (context["tp"].size if sequence_parallel else 1)
        rows = deepspeed.train_micro_batch_size_per_gpu * self.objective.rows_per_sample
        shape = (local_length, rows, run.model.hidden_size)
        peers = Peers(stages.group, shape, self.engine.dtype, context.device)
        self.runner = PipelineRunner(self.engine, peers, loss_chunk=0 if self.share.has_head else None)
        self.balancing = self._balancing(run)
        self._batch_rows = deepspeed.train_batch_size * self.objective.rows_per_sample
        self.micro_batch_samples = deepspeed.train_micro_batch_size_per_gpu
        self.vocab_size, self.hidden_size = run.model.vocab_size, run.model.hidden_size
        place = (stages.rank, stages.size, num_micro_batches)
        self._training = build_schedule(parallel.pipeline_schedule, *place)
        self._evaluation = forward_only(*place)

    def _balancing(self, run: RunConfig) -> ExpertBalancing | None:
        if not run.model.n_routed_experts:
            return None
        chunks: Any = self.engine.module
        routers = {layer: router for chunk in chunks for layer, router in chunk.routers().items()}
        name = "none" if run.lora.rank else run.balancing.rule  # where the base is frozen its biases are too
        rule = RULES[name](run.balancing, run.model)
        return ExpertBalancing(run.model, routers, rule, self.context)

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Take one optimizer step on a global batch, of which this rank is given its part."""
        batches = [batch.to(self.context.device) for batch in micro_batches]
        self.engine.begin_step()
        if self.balancing:
            # As of the losses below: a mean over samples, times what DeepSpeed divides by.
            data_size = self.context[DATA_AXES].size
            self.balancing.begin_step(data_size * self.engine.loss_scale / self._batch_rows)
        losses = self.runner.train(self._training, batches, self._loss_gradient(batches))
        grad_norm = self.engine.step(learning_rate)
        load = self.balancing.finish_step(self._batch_rows) if self.balancing else None
        summed = self._summed(losses, batches)
        return StepResult(summed.mean, grad_norm, load, summed.further_means)

    def evaluate(self, micro_batches: Sequence[Batch]) -> LossSum:
        """The losses of a global batch; nothing is learnt."""
        batches = [batch.to(self.context.device) for batch in micro_batches]
        with self.engine.evaluating():
            self.engine.begin_pass()
            losses = self.runner.evaluate(self._evaluation, batches)
        return self._summed(losses, batches)

    def score(self, micro_batches: Sequence[Batch]) -> torch.Tensor | None:
        """Log-probabilities [n] of the labels of each of this rank's rows together, where the head is.

        Nothing is learnt. Labels that are IGNORED have no part.
        """
        batches = [batch.to(self.context.device) for batch in micro_batches]
        chunks: Any = self.engine.module
        of_rows = partial(log_probabilities, vocab_size=self.vocab_size, group=self.context["tp"].group)
        with self.engine.evaluating():
            self.engine.begin_pass()
            try:
                for chunk in chunks:
                    chunk.loss = of_rows
                outputs = self.runner.outputs(self._evaluation, batches)
            finally:
                for chunk in chunks:
                    chunk.loss = self.objective.loss
        return torch.cat(outputs) if outputs and self.share.has_head else None

    def _loss_gradient(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The gradient of each loss sum: one over the global count, times what DeepSpeed divides by.

        It averages gradients over data-parallel ranks, and multiplies fp16's loss scale in, which the engine
        takes out of every backward: on this one it is wanted.
        """
        if not self.share.has_head:
            return torch.zeros(())
        data = self.context[DATA_AXES]
        count = self._count(batches)
        if data.size > 1:
            dist.all_reduce(count, group=data.group)
        return (data.size * self.engine.loss_scale / count).to(torch.float32)

    def _summed(self, losses: torch.Tensor | None, batches: Sequence[Batch]) -> LossSum:
        """The sums of all ranks that have a head and other data, on every rank of the world."""
        told = self.objective.sums
        sums = torch.zeros(2 + len(told), dtype=torch.float64, device=self.context.device)
        if losses is not None and self.context["tp"].rank == 0:
            sums = torch.cat([losses.to(torch.float64).view(1), self._count(batches).view(1), told])
        told.zero_()
        dist.all_reduce(sums)
        total, count, *further = sums.tolist()
        return LossSum(total, count, dict(zip(self.objective.measures, further, strict=True)))

    def _count(self, batches: Sequence[Batch]) -> torch.Tensor:
        return torch.stack([self.objective.count(batch) for batch in batches]).sum()


def adapters_of(run: RunConfig) -> Lora | None:
    """The adapters that a run trains, in place of weights."""
    return Lora(run.lora.rank, run.lora.scale, tuple(run.lora.targets)) if run.lora.rank else None


def share_of_stage(run: RunConfig, context: ParallelContext) -> StageShare:
    """What this rank's stage holds of the model."""
    stages = context["pp"]
    layers = layers_of_stage(run.model.num_hidden_layers, stages.size, stages.rank)
    return StageShare(layers, stages.rank == 0, stages.rank == stages.size - 1)


def require_finite(result: StepResult, step: int, precision: str) -> None:
    """Raise DivergedError on a loss or norm that is not a number; fp16 may skip a step by itself."""
    if not isfinite(result.loss) or (not isfinite(result.grad_norm) and precision != "fp16"):
        raise DivergedError(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: lower "
            "optimizer.learning_rate or lengthen schedule.warmup_steps, and start from an older checkpoint"
        )
