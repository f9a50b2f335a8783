"""One rank's part of a model in training: its stage, its engine, and the runner that drives them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from megalite.batch import Batch
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.kernels.choice import Kernels, choose_kernels
from megalite.model.balancing import RULES, ExpertBalancing, ExpertLoad
from megalite.model.llama import LlamaStage
from megalite.model.preference import log_probabilities, log_ratio
from megalite.model.share import StageShare
from megalite.optimizer.recipes import build_recipe
from megalite.parallel.context import ParallelContext
from megalite.parallel.deferred import DeferredGradients
from megalite.parallel.fp8 import choose_recipe
from megalite.parallel.plan import LayerPlan, Lora
from megalite.parallel.sequence import SequenceCut
from megalite.parallel.shard import Initializer
from megalite.parallel.topology import DATA_AXES
from megalite.pipeline.p2p import Peers
from megalite.pipeline.recording import Record, not_recorded
from megalite.pipeline.runner import PipelineRunner
from megalite.pipeline.schedule import build_schedule, forward_only, placement_of, rule_of
from megalite.plan.buckets import bucket_sizes
from megalite.plan.layout import RankLayout, shares_of_rank
from megalite.training.copies import Copies
from megalite.training.engine import StageEngine
from megalite.training.layout import build_context as build_context
from megalite.training.objective import build_objective
from megalite.training.places import Place
from megalite.training.qk_clip import QkClip

Objection = Callable[[float, float], str | None]


@dataclass(frozen=True)
class LossSum:
    """A sum of losses in nats, and what it is to be divided by; over any number of batches and ranks.

    further: sums of what else is told, by name, see `Objective.means`.
    """

    total: float = 0.0
    count: float = 0.0
    further: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "LossSum") -> "LossSum":
        further = {name: value + self.further.get(name, 0.0) for name, value in other.further.items()}
        return LossSum(self.total + other.total, self.count + other.count, further)

    @property
    def mean(self) -> float:
        """Nats per label, pair or answer that counts; not a number where none does."""
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step gave, the same on every rank: mean loss in nats, gradient norm unclipped.

    experts: what the routers did, where there are any.
    further: means of what else the objective tells, by name.
    is_taken: whether weights have changed.
    """

    loss: float
    grad_norm: float
    experts: ExpertLoad | None = None
    further: Mapping[str, float] = field(default_factory=dict)
    is_taken: bool = True


class StageTrainer:
    """Trains and evaluates on batches; every rank calls the same methods at the same time.

    The mean over labels, or pairs, is taken here alone: each stage with a head gives a sum, whose gradient is
    one over the count of the whole global batch, over micro batches and all ranks that see other data.

    Args:
        build_engine: takes what StageEngine takes; a dry run has one without DeepSpeed.
        kernels: in place of those that the run names.
        init: draws the initial weights, in place of the model's own initializer.
    """

    def __init__(
        self,
        run: RunConfig,
        deepspeed: DeepSpeedConfig,
        context: ParallelContext,
        *,
        build_engine: Callable[..., StageEngine] = StageEngine,
        kernels: Kernels | None = None,
        init: Initializer | None = None,
    ) -> None:
        self.context = context
        parallel, stages = run.parallel, context["pp"]
        num_micro_batches = deepspeed.num_micro_batches(context["dp"].size)
        self.sequence_parallel = sequence_parallel = parallel.sequence_parallel and context["tp"].size > 1
        self.kernels = kernels or named_kernels(run, context.device)
        splits = rule_of(parallel.pipeline_schedule).splits_backward
        deferred = DeferredGradients(parallel.weight_gradient_input == "keep") if splits else None
        shared: dict[str, Any] = {"kernels": self.kernels, "lora": adapters_of(run), "deferred": deferred}
        shared["tile_tokens"] = parallel.mlp_tile_tokens
        shared["row_chunks"] = parallel.row_overlap_chunks
        shared["fp8"] = choose_recipe(run.fp8.recipe, context.device, deepspeed.precision)
        plan = LayerPlan(context, sequence_parallel, init, **shared)
        self.placement = placement_of(parallel.pipeline_schedule, stages.size, parallel.num_chunks)
        shares = shares_of_rank(run, self.placement, stages.rank)
        self.objective = build_objective(run, context)
        options: dict[str, Any] = {"seed": run.seed, "recompute": parallel.recompute}
        options["offload"] = parallel.offload_activations
        options |= {"context_attention": parallel.context_attention, "loss": self.objective.loss}
        self.sequence = SequenceCut(run.data.seq_length, context["cp"], context.device)
        layout = RankLayout(run, deepspeed, context.topology.world_size, context.rank)
        self.engine = build_engine(
            lambda: build_chunks(run, plan, shares, **options),
            build_recipe(run.optimizer, self.kernels.adamw),
            deepspeed,
            context,
            num_micro_batches=num_micro_batches,
            parameter_gathering=parallel.parameter_gathering,
            bucket_sizes=bucket_sizes(layout),
            deferred=deferred,
        )
        local_length = len(self.sequence.places) // (context["tp"].size if sequence_parallel else 1)
        rows = deepspeed.train_micro_batch_size_per_gpu * run.rows_per_sample
        shape = (local_length, rows, run.model.hidden_size)
        peers = Peers(stages.group, shape, self.engine.dtype, context.device)
        loss_chunk = next((chunk for chunk, share in enumerate(shares) if share.has_head), None)
        self.runner = PipelineRunner(self.engine, peers, loss_chunk=loss_chunk)
        self.balancing = self._balancing(run)
        threshold, chunks = run.optimizer.muon.qk_clip, self.engine.module
        self.qk_clip = QkClip(threshold, chunks, context) if threshold is not None else None
        self._batch_rows = deepspeed.train_batch_size * run.rows_per_sample
        self.batch_samples = deepspeed.train_batch_size
        self.micro_batch_samples = deepspeed.train_micro_batch_size_per_gpu
        self.vocab_size, self.hidden_size = run.model.vocab_size, run.model.hidden_size
        place = (stages.rank, stages.size, num_micro_batches)
        self.num_micro_batches = num_micro_batches
        self._training = build_schedule(parallel.pipeline_schedule, *place, self.placement.num_chunks)
        self._evaluation = forward_only(stages.rank, self.placement, num_micro_batches)

    @property
    def has_head(self) -> bool:
        """Whether this rank computes logits and losses."""
        return self.runner.loss_chunk is not None

    def _balancing(self, run: RunConfig) -> ExpertBalancing | None:
        if not run.model.n_routed_experts:
            return None
        chunks: Any = self.engine.module
        routers = {layer: router for chunk in chunks for layer, router in chunk.routers().items()}
        name = "none" if run.lora.rank else run.balancing.rule  # where the base is frozen its biases are too
        rule = RULES[name](run.balancing, run.model)
        return ExpertBalancing(run.model, routers, rule, self.context)

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        learning_rate: float,
        objection: Objection | None = None,
        mark: Callable[[Place], None] = lambda place: None,
        record: Record = not_recorded,
    ) -> StepResult:
        """Take one optimizer step on a global batch, of which this rank is given its part.

        objection: to the step, by its loss and gradient norm; then it is not taken.
        mark: told each place as it is reached.
        record: entered around all that the pipeline does, and around the optimizer.
        """
        mark(Place.PASSES)
        batches = self._prepared(micro_batches)
        self.engine.begin_step()
        if self.balancing:
            # As of the losses below: a mean over samples, times what DeepSpeed divides by.
            data_size = self.context[DATA_AXES].size
            self.balancing.begin_step(data_size * self.engine.loss_scale / self._batch_rows)
        if self.qk_clip:
            self.qk_clip.begin_step()
        losses = self.runner.train(self._training, batches, self._loss_gradient(batches), record)
        mark(Place.OPTIMIZER)
        summed = self._summed(losses, batches)
        if self.qk_clip:
            self.engine.scale_rows(self.qk_clip.row_factors())
        with record("update", None):
            norm, is_taken = self.engine.step(learning_rate, self._agreed(objection, summed.mean))
        load = self.balancing.finish_step(self._batch_rows, is_taken) if self.balancing else None
        return StepResult(summed.mean, norm, load, self._further(summed), is_taken)

    def try_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, mark: Callable[[Place], None]
    ) -> StepResult:
        """The same, without taking it."""
        return self.train_step(micro_batches, learning_rate, lambda loss, norm: "only tried", mark)

    def _agreed(self, objection: Objection | None, loss: float) -> Callable[[float], bool] | None:
        """Whether any rank objects to a step of this loss and a norm: one may see another last bit."""
        if objection is None:
            return None

        def refuses(norm: float) -> bool:
            objects = torch.tensor(objection(loss, norm) is not None, dtype=torch.int32)
            objects = objects.to(self.context.device)
            dist.all_reduce(objects, dist.ReduceOp.MAX)
            return bool(objects)

        return refuses

    @cached_property
    def copies(self) -> Copies:
        """Of its state on other ranks."""
        return Copies(self.engine)

    def evaluate(self, micro_batches: Sequence[Batch]) -> LossSum:
        """The losses of a global batch; nothing is learnt."""
        batches = self._prepared(micro_batches)
        with self.engine.evaluating():
            self.engine.begin_pass()
            losses = self.runner.evaluate(self._evaluation, batches)
        return self._summed(losses, batches)

    def score(self, micro_batches: Sequence[Batch]) -> torch.Tensor | None:
        """Log-probabilities [n] of the labels of each of this rank's rows together, where the head is.

        Nothing is learnt. Labels that are IGNORED have no part.
        """
        return self._score(self._own(micro_batches))

    def _score(self, batches: Sequence[Batch]) -> torch.Tensor | None:
        chunks: Any = self.engine.module
        of_rows = partial(log_probabilities, cp_group=self.context["cp"].group)
        with self.engine.evaluating():
            self.engine.begin_pass()
            try:
                for chunk in chunks:
                    chunk.loss = of_rows
                outputs = self.runner.outputs(self._evaluation, batches)
            finally:
                for chunk in chunks:
                    chunk.loss = self.objective.loss
        return torch.cat(outputs) if outputs and self.has_head else None

    def means(self, losses: LossSum) -> dict[str, float]:
        """The mean loss as `loss`, and by their names the means of what else the objective tells."""
        return {"loss": losses.mean, **self._further(losses)}

    def _further(self, losses: LossSum) -> dict[str, float]:
        return self.objective.means(losses.further, losses.count) if losses.count else {}

    def _own(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """On the device, this rank's part of each sequence."""
        return [batch.to(self.context.device).part(self.sequence.places) for batch in micro_batches]

    def _prepared(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """This rank's parts; where there are mismatched rows, with the reference point of the global batch.

        That is how far the model has moved from its start: the mean over these rows of log-probability less
        reference, at least 0. It takes a forward pass of its own, since all rows of all ranks have a part in
        the loss of each.
        """
        batches = self._own(micro_batches)
        mismatched = [batch.mismatched for batch in batches if batch.mismatched is not None]
        log_p = self._score(mismatched) if mismatched else None
        if log_p is None:
            return batches
        sums, data = log_ratio(log_p, mismatched), self.context[DATA_AXES]
        if data.size > 1:
            dist.all_reduce(sums, group=data.group)
        point = (sums[0] / sums[1]).clamp(min=0).to(torch.float32)
        return [replace(batch, reference_point=point) for batch in batches]

    def _loss_gradient(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The gradient of each loss sum: one over the global count, times what DeepSpeed divides by.

        It averages gradients over data-parallel ranks, and multiplies fp16's loss scale in, which the engine
        takes out of every backward: on this one it is wanted.
        """
        if not self.has_head:
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


def named_kernels(run: RunConfig, device: torch.device) -> Kernels:
    """What a run computes with on a device; KernelError where that cannot be."""
    return choose_kernels(**run.kernels.model_dump(), adamw=run.optimizer.implementation, device=device)


def adapters_of(run: RunConfig) -> Lora | None:
    """The adapters that a run trains, in place of weights."""
    return Lora(run.lora.rank, run.lora.scale, tuple(run.lora.targets)) if run.lora.rank else None


def build_chunks(
    run: RunConfig, plan: LayerPlan, shares: Sequence[StageShare], **options: Any
) -> list[LlamaStage]:
    """The chunks of a rank; the head's takes the embedding's table where they are tied."""
    chunks: list[LlamaStage] = []
    for share in shares:
        table = chunks[0].embed_tokens if share.has_head and share.has_other_end else None
        chunks.append(LlamaStage(run.model, plan, share, table=table, **options))
    return chunks
